#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cospadi/runtime.hpp"

namespace cospadi {
namespace {

TEST(Runtime, UsesAnAvailableInstructionSet) {
  const auto available = available_isas();
  ASSERT_FALSE(available.empty());
  EXPECT_EQ(available.front(), "generic");
  EXPECT_NE(std::find(available.begin(), available.end(), isa_name()), available.end());
  const char* wanted = std::getenv("COSPADI_ISA");
  if (wanted != nullptr) {
    EXPECT_STREQ(isa_name(), wanted);
  }
}

TEST(Runtime, DescribesItself) {
  EXPECT_NE(std::string(version()).find('.'), std::string::npos);
  EXPECT_GE(default_thread_count(), 1);
}

TEST(Runtime, CudaAnswersWithAndWithoutADevice) {
  if (cuda_device_count() > 0) {
    EXPECT_TRUE(cuda_built());
    EXPECT_TRUE(cuda_unavailable_reason().empty());
  } else {
    EXPECT_FALSE(cuda_unavailable_reason().empty());
  }
}

}  // namespace
}  // namespace cospadi
