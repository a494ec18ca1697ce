#include <opkit/kernel.h>
#include <opkit_kernels/blocks.h>
#include <string.h>

using namespace opkit_kernels;

// Turn the pairs of one head, and copy what is past them.
template <class T, class A>
static void turn_head(const T* __restrict x, const A* __restrict cos, const A* __restrict sin,
                      int64_t pairs, int64_t d, bool interleaved, T* __restrict y) {
  if (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const A a = A(x[2 * i]), b = A(x[2 * i + 1]);
      y[2 * i] = T(a * cos[i] - b * sin[i]);
      y[2 * i + 1] = T(b * cos[i] + a * sin[i]);
    }
  } else {
    const T* second = x + pairs;
    T* second_out = y + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const A a = A(x[i]), b = A(second[i]);
      y[i] = T(a * cos[i] - b * sin[i]);
      second_out[i] = T(b * cos[i] + a * sin[i]);
    }
  }
  if (2 * pairs < d) memcpy(y + 2 * pairs, x + 2 * pairs, (d - 2 * pairs) * sizeof(T));
}

// The row of a table for every element of the sequences.
static void find_rows(opkit::Tensor positions, opkit::Tensor table, int64_t length, int64_t count,
                      int64_t* rows) {
  const int64_t m = table.size(0);
  if (!positions) {
    OPKIT_CHECK(length <= m, "the sequence has ", length, " elements and cos ", m,
                " rows; expected a row for each, or positions");
    for (int64_t r = 0; r < count; ++r) rows[r] = r % length;
    return;
  }
  const opkit::Elements<int64_t> given(positions);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t p = given[r];
    OPKIT_CHECK(p >= 0 && p < m, "position ", p, " of element ", r,
                " is out of range; expected 0 <= position < ", m, ", the number of rows of cos");
    rows[r] = p;
  }
}

// out[i] = sign table[row, i]
template <class A>
static void read_row(opkit::Tensor table, int64_t row, A sign, A* out) {
  dispatch_floating(table, [&](auto zero) {
    const auto in = table.view<const decltype(zero), 2>();
    for (int64_t i = 0; i < in.size(1); ++i) out[i] = sign * A(in(row, i));
  });
}

static void turn(opkit::Tensor q, opkit::Tensor k, opkit::Tensor cos, opkit::Tensor sin,
                 opkit::Tensor positions, bool interleaved, int sign, opkit::Tensor q_out,
                 opkit::Tensor k_out) {
  const int64_t d = q.size(-1), pairs = cos.size(1), length = q.size(-3);
  OPKIT_CHECK(2 * pairs <= d, "cos has ", pairs, " columns, one for each pair, and heads have ", d,
              " elements; expected at most half as many");
  int64_t count = 1;  // elements of all sequences
  for (int64_t i = 0; i < q.dim() - 2; ++i) count *= q.size(i);
  const Buffer<int64_t> rows(count);
  find_rows(positions, cos, length, count, rows.data());
  dispatch_floating(q, [&](auto zero) {
    using T = decltype(zero);
    using A = Wide<T>;
    const opkit::Elements<T> xs[2] = {opkit::Elements<T>(q), opkit::Elements<T>(k)};
    T* const outs[2] = {q_out.data<T>(), k_out.data<T>()};
    const int64_t heads[2] = {q.size(-2), k.size(-2)};
    const int64_t grain = row_grain((heads[0] + heads[1]) * d);
    opkit::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      const Reader<T> readers[2] = {Reader<T>(xs[0], d), Reader<T>(xs[1], d)};
      const Writer<T> writers[2] = {Writer<T>(outs[0], d), Writer<T>(outs[1], d)};
      const Buffer<A> c(pairs), s(pairs);
      for (int64_t r = begin; r < end; ++r) {
        read_row(cos, rows.data()[r], A(1), c.data());
        read_row(sin, rows.data()[r], A(sign), s.data());
        for (int which = 0; which < 2; ++which) {
          for (int64_t head = r * heads[which]; head < (r + 1) * heads[which]; ++head) {
            turn_head(readers[which].read(head * d, d), c.data(), s.data(), pairs, d, interleaved,
                      writers[which].at(head * d));
            writers[which].done(head * d, d);
          }
        }
      }
    });
  });
}

// y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin, for each pair of each head
void rope(opkit::Tensor q, opkit::Tensor k, opkit::Tensor cos, opkit::Tensor sin,
          opkit::Tensor positions, bool interleaved, opkit::Tensor q_out, opkit::Tensor k_out) {
  turn(q, k, cos, sin, positions, interleaved, 1, q_out, k_out);
}

// The same with the angles' negatives.
void rope_backward(opkit::Tensor grad_q, opkit::Tensor grad_k, opkit::Tensor cos, opkit::Tensor sin,
                   opkit::Tensor positions, bool interleaved, opkit::Tensor q_out,
                   opkit::Tensor k_out) {
  turn(grad_q, grad_k, cos, sin, positions, interleaved, -1, q_out, k_out);
}
