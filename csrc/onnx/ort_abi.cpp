#include "onnx/ort_abi.hpp"

#include <string>

#include "cospadi/status.hpp"

namespace cospadi::onnx {

Api::Api(const OrtApi* api)
    : create_status(api),
      status_message(api),
      release_status(api),
      create_domain(api),
      add_op(api),
      add_domain(api),
      has_config(api),
      get_config(api),
      tensor_data(api),
      type_and_shape(api),
      element_type(api),
      dimension_count(api),
      dimensions(api),
      release_type_and_shape(api),
      int_attribute(api),
      text_attribute(api),
      input_count(api),
      node_name(api),
      constant_input(api),
      input(api),
      output(api) {}

void Api::check(OrtStatus* status) const {
  if (status == nullptr) return;
  const std::string message = status_message.call(status);
  release_status.call(status);
  throw Error(ErrorCode::kInvalidArgument, message);
}

bool Api::succeeded(OrtStatus* status) const noexcept {
  if (status == nullptr) return true;
  release_status.call(status);
  return false;
}

}  // namespace cospadi::onnx
