// Stands in for SentencePiece, so that gemma/tokenizer.cc compiles without it: the driver feeds token ids.
#pragma once

#include <string>
#include <vector>

namespace sentencepiece {

struct Status {
  bool ok() const { return false; }
};

struct SentencePieceProcessor {
  Status LoadFromSerializedProto(const std::string&) { return {}; }
  std::string serialized_model_proto() const { return {}; }
  template <typename Out>
  Status Encode(const std::string&, Out*) const { return {}; }
  Status Decode(const std::vector<int>&, std::string*) const { return {}; }
};

}  // namespace sentencepiece
