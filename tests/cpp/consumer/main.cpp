// llama_block FOLDER LAYER INPUT OUTPUT: runs one block of the compressed Llama in FOLDER. INPUT
// and OUTPUT are files of floats [n_tokens x hidden_size].

#include <cospadi/runtime.hpp>
#include <cospadi/status.hpp>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama_block.hpp"

namespace {

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::streamoff bytes = file.tellg();
  std::vector<float> values(static_cast<size_t>(bytes) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  return values;
}

void write_floats(const std::string& path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

int run(int argc, char** argv) {
  if (argc != 5) throw std::runtime_error("usage: llama_block FOLDER LAYER INPUT OUTPUT");
  const cospadi::Checkpoint checkpoint = cospadi::Checkpoint::open(argv[1]);
  const LlamaBlock block(checkpoint, std::stoll(argv[2]), 0);
  std::vector<float> hidden = read_floats(argv[3]);
  if (static_cast<int64_t>(hidden.size()) % block.hidden_size() != 0) {
    throw std::runtime_error("INPUT: not a whole number of tokens");
  }
  block.forward(hidden);
  write_floats(argv[4], hidden);
  std::printf("cospadi %s, %s\n", cospadi::version(), cospadi::isa_name());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const cospadi::Error& error) {
    std::fprintf(stderr, "cospadi error %d: %s\n", static_cast<int>(error.code()), error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
