// One transformer block of a compressed Llama, as a server would run it without a cache.
#pragma once

#include <cospadi/checkpoint.hpp>
#include <cstdint>
#include <string>
#include <vector>

/// RMSNorm, attention with grouped queries and rotary positions, RMSNorm, gated MLP. All seven
/// projections are compressed; the norms are plain tensors of the checkpoint.
class LlamaBlock {
 public:
  LlamaBlock(const cospadi::Checkpoint& checkpoint, int64_t layer, int n_threads);

  int64_t hidden_size() const { return hidden_; }

  /// `hidden` [n_tokens x hidden_size], one sequence from position 0 on, is replaced by the block's
  /// output.
  void forward(std::vector<float>& hidden) const;

 private:
  std::vector<float> project(const cospadi::Layer& layer, const std::vector<float>& x) const;
  std::vector<float> normalized(const std::vector<float>& x,
                                const std::vector<float>& weight) const;
  void rotate(std::vector<float>& heads, int64_t n_heads) const;
  std::vector<float> attend(const std::vector<float>& q,
                            const std::vector<float>& k,
                            const std::vector<float>& v) const;

  int n_threads_;
  int64_t hidden_;
  int64_t n_heads_;
  int64_t n_kv_heads_;
  int64_t head_dim_;
  float epsilon_;
  float theta_;
  std::vector<float> input_norm_;
  std::vector<float> mlp_norm_;
  cospadi::Layer q_, k_, v_, o_, gate_, up_, down_;
};
