// Writes the seeds of the corpus, which are kept beside it: PROGRAM FOLDER. Inputs that a fuzzer
// found are added there by hand, with names that say what they were.

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "../cpp/checkpoint_folder.hpp"

namespace {

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace cospadi;
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  const std::filesystem::path root = argv[1];
  const TestCheckpoint made = make_checkpoint();
  const std::string file = safetensors_bytes(made.tensors);
  const size_t data = file.rfind("}}") + 2;
  const std::string header = file.substr(8, data - 8);
  const std::string between = "\n====\n";

  write(root / "fuzz_checkpoint" / "all_kinds",
        made.config + between + header + between + file.substr(data));
  write(root / "fuzz_checkpoint" / "no_modules", "{}" + between + header + between + "abc");
  write(root / "fuzz_config" / "all_kinds", made.config);
  write(root / "fuzz_config" / "values",
        R"({"a":[1,2.5e-3,true,null,"\u00e4\ud83d\ude00\n"],"b":{"c":{"d":[[],{}]}},"e":-0})");
  write(root / "fuzz_config" / "one_module",
        R"({"quantization_config":{"quant_method":"cospadi","format_version":1,"modules":{"a":)"
        R"({"d_in":8,"d_out":6,"n_atoms":4,"sparsity":2,"support":"mask","bias":false}}}})");
  write(root / "fuzz_header" / "whole_file", std::string(1, '\0') + file);
  write(root / "fuzz_header" / "two_tensors",
        "\x01\x0a"
        R"({"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
        R"("b":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]}})");
  write(root / "fuzz_header" / "no_tensors",
        std::string("\x01\0", 2) + R"({"__metadata__":{"format":"pt"}})");
  return 0;
}
