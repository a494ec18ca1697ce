// A module of Python's own types: no header of torch, so it builds in seconds and fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

// The vocabulary of a byte-pair tokenizer: pairs of tokens that are merged, most frequent first.
class Merges {
 public:
  // Merge the most frequent pair of neighbours, `count` times.
  explicit Merges(const std::string& text, int count) {
    std::vector<int32_t> tokens = bytes(text);
    for (int32_t made = 256; made < 256 + count; ++made) {
      std::unordered_map<uint64_t, int> seen;
      for (size_t i = 1; i < tokens.size(); ++i) ++seen[pair(tokens[i - 1], tokens[i])];
      uint64_t best = 0;
      int most = 1;
      for (const auto& [key, times] : seen)
        if (times > most || (times == most && times > 1 && key < best)) best = key, most = times;
      if (most < 2) break;
      merges_.push_back(best);
      replace(tokens, best, made);
    }
  }

  std::vector<int32_t> encode(const std::string& text) const {
    std::vector<int32_t> tokens = bytes(text);
    for (size_t i = 0; i < merges_.size(); ++i)
      replace(tokens, merges_[i], 256 + static_cast<int32_t>(i));
    return tokens;
  }

  std::string decode(const std::vector<int32_t>& tokens) const {
    std::string text;
    for (int32_t token : tokens) append(text, token);
    return text;
  }

  size_t size() const { return merges_.size(); }

 private:
  static std::vector<int32_t> bytes(const std::string& text) {
    const auto* data = reinterpret_cast<const unsigned char*>(text.data());
    return {data, data + text.size()};
  }

  static uint64_t pair(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

  static void replace(std::vector<int32_t>& tokens, uint64_t what, int32_t with) {
    size_t kept = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool found = i + 1 < tokens.size() && pair(tokens[i], tokens[i + 1]) == what;
      tokens[kept++] = found ? with : tokens[i];
      i += found;
    }
    tokens.resize(kept);
  }

  void append(std::string& text, int32_t token) const {
    if (token < 256) {
      text.push_back(static_cast<char>(token));
      return;
    }
    const uint64_t merged = merges_.at(static_cast<size_t>(token) - 256);
    append(text, static_cast<int32_t>(merged >> 32));
    append(text, static_cast<int32_t>(merged));
  }

  std::vector<uint64_t> merges_;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Merges>(m, "Merges")
      .def(py::init<const std::string&, int>(), py::arg("text"), py::arg("count"))
      .def("encode", &Merges::encode, py::arg("text"))
      .def("decode", [](const Merges& self,
                        const std::vector<int32_t>& t) { return py::bytes(self.decode(t)); })
      .def("__len__", &Merges::size);
}
