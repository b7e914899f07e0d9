// Times the decode of gemma.cpp on the 110M Griffin of benchmarks.cpu, random weights, one turn for each line of stdin.
//
//   driver THREADS ROWS bf16|sfp [FOLDER]
//
// Says what it is in a line of JSON once it is warm, then decodes N tokens a row for every line "N" and says how fast.
// Between turns its threads block. FOLDER (/tmp) holds the weights for as long as it takes to read them.
#include <unistd.h>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "compression/types.h"
#define HWY_DISABLED_TARGETS GEMMA_DISABLED_TARGETS  // as in every file of gemma.cpp, before highway.h
#include "gemma/gemma.h"
#include "gemma/tokenizer.h"
#include "hwy/highway.h"
#include "hwy/timer.h"

namespace {

constexpr uint32_t kWidth = 768, kLayers = 12, kHeads = 6, kWindow = 1024, kPositions = 8192;

gcpp::ModelConfig Shape(gcpp::Type type) {
  gcpp::ModelConfig config(gcpp::Model::GRIFFIN_2B, type, gcpp::PromptWrapping::GEMMA_PT);
  config.model_dim = kWidth;
  config.vocab_size = 32000;
  config.num_layers = kLayers;
  config.max_seq_len = kPositions;  // of the ring of keys and values; a query sees the window
  config.attention_window_sizes.assign(kLayers, kWindow);
  config.final_cap = 30.0f;
  config.eos_id = config.secondary_eos_id = -1;  // never stop
  config.layer_configs.resize(kLayers);
  for (gcpp::LayerConfig& layer : config.layer_configs) {  // R R A, as in the 2B
    const bool attention = layer.type == gcpp::LayerAttentionType::kGemma;
    layer.model_dim = kWidth;
    layer.griffin_dim = attention ? 0 : kWidth;
    layer.ff_hidden_dim = 2304;
    layer.heads = kHeads;
    layer.qkv_dim = kWidth / kHeads;
  }
  return config;
}

// Small random numbers; a decay's parameter is below zero.
void Fill(gcpp::MatPtr& mat, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 0.02f);
  const size_t count = mat.Extents().Area();
  if (mat.GetType() == gcpp::Type::kF32) {
    const bool decay = std::string(mat.Name()).rfind("gr_a", 0) == 0;
    for (size_t i = 0; i < count; ++i) static_cast<float*>(mat.Packed())[i] = decay ? -0.5f : normal(random);
  } else if (mat.GetType() == gcpp::Type::kBF16) {
    hwy::bfloat16_t* to = static_cast<hwy::bfloat16_t*>(mat.Packed());
    for (size_t i = 0; i < count; ++i) to[i] = hwy::ConvertScalarTo<hwy::bfloat16_t>(normal(random));
  } else {  // any byte is a number: a sign and a magnitude, of which the smaller half
    for (size_t i = 0; i < count; ++i) static_cast<uint8_t*>(mat.Packed())[i] = random() & 0xBF;
  }
}

// Writes a model of random weights in gemma.cpp's format; returns the bytes that a step reads.
size_t Write(const gcpp::Path& path, gcpp::Type type, gcpp::ThreadingContext& ctx) {
  const gcpp::ModelConfig config = Shape(type);
  gcpp::WeightsPtrs weights(config);
  std::vector<gcpp::MatOwner> owners;
  std::mt19937 random;
  size_t bytes = 0;
  weights.ForEachTensor(nullptr, nullptr, [&](const gcpp::TensorArgs& tensor) {
    const std::string name = tensor.mat.Name();
    for (const char* other : {"att_ein", "qkv1", "qkv2", "gating1", "gating2"})  // of att_w, qkv_ein and gating_ein
      if (name.rfind(other, 0) == 0) return;
    const bool norm = tensor.mat.Rows() == 1;
    if (tensor.mat.GetType() == gcpp::Type::kUnknown) tensor.mat.SetType(norm ? gcpp::Type::kBF16 : type);
    owners.emplace_back();
    owners.back().AllocateFor(tensor.mat, ctx.allocator, gcpp::MatPadding::kPacked);
    Fill(tensor.mat, random);
    bytes += tensor.mat.PackedBytes();
  });
  gcpp::BlobWriter writer(path, ctx.pools.Pool());
  const std::vector<uint32_t> serialized = weights.AddTensorDataToWriter(writer);
  gcpp::WriteSingleFile(config, gcpp::GemmaTokenizer(gcpp::kMockTokenizer), serialized, writer);
  return bytes;
}

bool Tuned(const gcpp::MatMulEnv& env) {  // every matrix product has found its fastest blocking
  for (const auto& cluster : env.per_cluster)
    for (const auto& key : cluster.per_key)
      if (!key.autotune.Best()) return false;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return fprintf(stderr, "driver THREADS ROWS bf16|sfp [FOLDER]\n"), 2;
  const size_t rows = std::strtoul(argv[2], nullptr, 10);
  const gcpp::Type type = std::string(argv[3]) == "sfp" ? gcpp::Type::kSFP : gcpp::Type::kBF16;
  gcpp::ThreadingArgs threading;  // pins and spins where it may
  threading.max_threads = std::strtoul(argv[1], nullptr, 10);
  gcpp::ThreadingContext ctx(threading);
  gcpp::MatMulEnv env(ctx);

  const std::string path = std::string(argc > 4 ? argv[4] : "/tmp") + "/gemma_cpp." + std::to_string(getpid()) + ".sbs";
  const size_t bytes = Write(gcpp::Path(path), type, ctx);
  gcpp::InferenceArgs inference;
  inference.seq_len = kPositions;
  const gcpp::Gemma model(gcpp::LoaderArgs("", path), inference, ctx);
  unlink(path.c_str());

  std::vector<gcpp::KVCache> states;
  for (size_t row = 0; row < rows; ++row) states.emplace_back(model.Config(), inference, ctx.allocator);
  const std::vector<int> prompt(16, 7);
  const std::vector<gcpp::PromptTokens> prompts(rows, gcpp::PromptTokens(prompt.data(), prompt.size()));

  bool warm = false;
  size_t tokens = 0, left = 0;
  double start = 0.0;  // of the turn
  gcpp::RuntimeConfig runtime;
  runtime.max_generated_tokens = kPositions - prompt.size();
  runtime.prefill_tbatch_size = 1;
  runtime.decode_qbatch_size = rows;
  runtime.verbosity = 0;  // and top_k is 1: greedy
  // Called for every token of every row; with the last row's, between two steps, a turn ends and the next is awaited.
  runtime.batch_stream_token = [&](size_t row, size_t position, int, float) {
    if (row + 1 < rows || position + 1 < prompt.size()) return true;
    if (!warm) {
      if (position < prompt.size() + 32 || !Tuned(env)) return true;
      warm = true;
      printf("{\"threads\": %zu, \"rows\": %zu, \"weight_bytes\": %zu, \"target\": \"%s\", \"pinning\": \"%s\"}\n",
             ctx.pools.TotalWorkers(), rows, bytes, hwy::TargetName(HWY_STATIC_TARGET), ctx.pools.PinString());
    } else if (left > 0 && --left == 0) {
      printf("{\"tokens_per_s\": %.3f}\n", rows * tokens / (hwy::platform::Now() - start));
    }
    if (left == 0) {
      ctx.pools.MaybeStopSpinning(runtime.use_spinning);
      fflush(stdout);
      if (scanf("%zu", &tokens) != 1 || tokens == 0) exit(0);
      left = tokens;
      ctx.pools.MaybeStartSpinning(runtime.use_spinning);
      start = hwy::platform::Now();
    }
    return true;
  };
  gcpp::TimingInfo timing;
  const hwy::Span<const gcpp::PromptTokens> all_prompts(prompts.data(), rows);
  for (;;) {  // from position 0 again when the positions are used up
    gcpp::AllQueries queries(all_prompts, hwy::Span<gcpp::KVCache>(states.data(), rows));
    model.GenerateBatch(runtime, queries, env, timing);
  }
}
