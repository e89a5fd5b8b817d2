#include "llama_block.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace {

double number(const cospadi::Checkpoint& checkpoint, const std::string& path) {
  const auto value = checkpoint.config_number(path);
  if (!value) throw std::runtime_error("config.json has no number " + path);
  return *value;
}

std::vector<float> floats(const cospadi::Checkpoint& checkpoint, const std::string& name) {
  const cospadi::TensorView tensor = checkpoint.tensor(name);
  std::vector<float> values(static_cast<size_t>(tensor.shape[0]));
  cospadi::copy_floats(tensor, values);
  return values;
}

void add(std::vector<float>& sum, const std::vector<float>& part) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
}

}  // namespace

LlamaBlock::LlamaBlock(const cospadi::Checkpoint& checkpoint, int64_t layer, int n_threads)
    : n_threads_(n_threads),
      hidden_(static_cast<int64_t>(number(checkpoint, "hidden_size"))),
      n_heads_(static_cast<int64_t>(number(checkpoint, "num_attention_heads"))),
      n_kv_heads_(static_cast<int64_t>(number(checkpoint, "num_key_value_heads"))),
      head_dim_(static_cast<int64_t>(
          checkpoint.config_number("head_dim").value_or(static_cast<double>(hidden_ / n_heads_)))),
      epsilon_(static_cast<float>(number(checkpoint, "rms_norm_eps"))),
      theta_(static_cast<float>(number(checkpoint, "rope_parameters.rope_theta"))),
      input_norm_(
          floats(checkpoint, "model.layers." + std::to_string(layer) + ".input_layernorm.weight")),
      mlp_norm_(
          floats(checkpoint,
                 "model.layers." + std::to_string(layer) + ".post_attention_layernorm.weight")),
      q_(checkpoint.layer("model.layers." + std::to_string(layer) + ".self_attn.q_proj")),
      k_(checkpoint.layer("model.layers." + std::to_string(layer) + ".self_attn.k_proj")),
      v_(checkpoint.layer("model.layers." + std::to_string(layer) + ".self_attn.v_proj")),
      o_(checkpoint.layer("model.layers." + std::to_string(layer) + ".self_attn.o_proj")),
      gate_(checkpoint.layer("model.layers." + std::to_string(layer) + ".mlp.gate_proj")),
      up_(checkpoint.layer("model.layers." + std::to_string(layer) + ".mlp.up_proj")),
      down_(checkpoint.layer("model.layers." + std::to_string(layer) + ".mlp.down_proj")) {}

std::vector<float> LlamaBlock::project(const cospadi::Layer& layer,
                                       const std::vector<float>& x) const {
  const int64_t d_in = layer.info().d_in;
  const int64_t d_out = layer.info().d_out;
  const int64_t n_tokens = static_cast<int64_t>(x.size()) / d_in;
  std::vector<float> y(static_cast<size_t>(n_tokens * d_out));
  layer.forward({x.data(), cospadi::DType::kFloat32, n_tokens, d_in, d_in},
                {y.data(), cospadi::DType::kFloat32, n_tokens, d_out, d_out},
                n_threads_);
  return y;
}

std::vector<float> LlamaBlock::normalized(const std::vector<float>& x,
                                          const std::vector<float>& weight) const {
  std::vector<float> y(x.size());
  const size_t size = weight.size();
  for (size_t first = 0; first < x.size(); first += size) {
    float squares = 0.0F;
    for (size_t i = 0; i < size; ++i) squares += x[first + i] * x[first + i];
    const float factor = 1.0F / std::sqrt(squares / static_cast<float>(size) + epsilon_);
    for (size_t i = 0; i < size; ++i) y[first + i] = x[first + i] * factor * weight[i];
  }
  return y;
}

/// Rotates feature i of each head against feature i + head_dim / 2.
void LlamaBlock::rotate(std::vector<float>& heads, int64_t n_heads) const {
  const int64_t half = head_dim_ / 2;
  const int64_t n_tokens = static_cast<int64_t>(heads.size()) / (n_heads * head_dim_);
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t i = 0; i < half; ++i) {
      const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim_);
      const float angle = static_cast<float>(t) / std::pow(theta_, exponent);
      const float cosine = std::cos(angle);
      const float sine = std::sin(angle);
      for (int64_t h = 0; h < n_heads; ++h) {
        float* const head = heads.data() + (t * n_heads + h) * head_dim_;
        const float a = head[i];
        const float b = head[i + half];
        head[i] = a * cosine - b * sine;
        head[i + half] = b * cosine + a * sine;
      }
    }
  }
}

/// Causal attention; each head of k and v serves n_heads / n_kv_heads heads of q.
std::vector<float> LlamaBlock::attend(const std::vector<float>& q,
                                      const std::vector<float>& k,
                                      const std::vector<float>& v) const {
  const int64_t n_tokens = static_cast<int64_t>(q.size()) / (n_heads_ * head_dim_);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
  std::vector<float> out(q.size(), 0.0F);
  std::vector<float> weights(static_cast<size_t>(n_tokens));
  for (int64_t h = 0; h < n_heads_; ++h) {
    const int64_t shared = h / (n_heads_ / n_kv_heads_);
    for (int64_t t = 0; t < n_tokens; ++t) {
      const float* const query = q.data() + (t * n_heads_ + h) * head_dim_;
      float largest = -INFINITY;
      for (int64_t u = 0; u <= t; ++u) {
        const float* const key = k.data() + (u * n_kv_heads_ + shared) * head_dim_;
        float product = 0.0F;
        for (int64_t i = 0; i < head_dim_; ++i) product += query[i] * key[i];
        weights[static_cast<size_t>(u)] = product * scale;
        largest = std::max(largest, product * scale);
      }
      float total = 0.0F;
      for (int64_t u = 0; u <= t; ++u) {
        float& weight = weights[static_cast<size_t>(u)];
        weight = std::exp(weight - largest);
        total += weight;
      }
      float* const result = out.data() + (t * n_heads_ + h) * head_dim_;
      for (int64_t u = 0; u <= t; ++u) {
        const float* const value = v.data() + (u * n_kv_heads_ + shared) * head_dim_;
        const float weight = weights[static_cast<size_t>(u)] / total;
        for (int64_t i = 0; i < head_dim_; ++i) result[i] += weight * value[i];
      }
    }
  }
  return out;
}

void LlamaBlock::forward(std::vector<float>& hidden) const {
  const std::vector<float> attention_input = normalized(hidden, input_norm_);
  std::vector<float> q = project(q_, attention_input);
  std::vector<float> k = project(k_, attention_input);
  const std::vector<float> v = project(v_, attention_input);
  rotate(q, n_heads_);
  rotate(k, n_kv_heads_);
  add(hidden, project(o_, attend(q, k, v)));

  const std::vector<float> mlp_input = normalized(hidden, mlp_norm_);
  std::vector<float> gate = project(gate_, mlp_input);
  const std::vector<float> up = project(up_, mlp_input);
  for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1.0F + std::exp(-gate[i]));  // SiLU
  add(hidden, project(down_, gate));
}
