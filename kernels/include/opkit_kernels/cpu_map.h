// Functions of single elements of tensors of one shape: several inputs, several outputs.
#pragma once

#include <opkit_kernels/blocks.h>

#include <utility>

namespace opkit_kernels {

constexpr int64_t kBlock = 1024;  // elements at a time, so that copies stay in the L1 cache

template <class Function, class T, int kIn, int kOut, size_t... J, size_t... K>
void map_elements(const opkit::Elements<T> (&inputs)[kIn], T* const (&outputs)[kOut], int64_t begin,
                  int64_t end, std::index_sequence<J...>, std::index_sequence<K...>) {
  using A = Wide<T>;
  using In = typename Reader<T>::Element;
  using Out = typename Writer<T>::Element;
  const Reader<T> in[kIn] = {Reader<T>(inputs[J], kBlock)...};
  const Writer<T> out[kOut] = {Writer<T>(outputs[K], kBlock)...};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const In* const from[kIn] = {in[J].read(i, count)...};
    Out* const to[kOut] = {out[K].at(i)...};
    for (int64_t k = 0; k < count; ++k) {  // not omp simd, for which gcc puts x and y in memory
      const A x[kIn] = {A(from[J][k])...};
      A y[kOut];
      Function()(x, y);
      ((to[K][k] = Out(y[K])), ...);
    }
    (out[K].done(i, count), ...);
  }
}

template <class Function, int kIn, int kOut, size_t... J, size_t... K>
void map(const opkit::Tensor (&inputs)[kIn], const opkit::Tensor (&outputs)[kOut],
         std::index_sequence<J...> in, std::index_sequence<K...> out) {
  dispatch_floating(outputs[0], [&](auto zero) {
    using T = decltype(zero);
    const opkit::Elements<T> from[kIn] = {opkit::Elements<T>(inputs[J])...};
    T* const to[kOut] = {outputs[K].template data<T>()...};
    opkit::parallel_for(0, outputs[0].numel(), 8192, [&](int64_t begin, int64_t end) {
      map_elements<Function>(from, to, begin, end, in, out);
    });
  });
}

// Call function(x, y) with the elements x[kIn] of the inputs at every place; it sets the y[kOut] of the outputs. Both
// are of the type that is computed in.
template <class Function, int kIn, int kOut>
void map(const opkit::Tensor (&inputs)[kIn], const opkit::Tensor (&outputs)[kOut]) {
  map<Function>(inputs, outputs, std::make_index_sequence<kIn>(), std::make_index_sequence<kOut>());
}

}  // namespace opkit_kernels
