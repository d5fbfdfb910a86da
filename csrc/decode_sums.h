// Sums of a Linear's weight rows for one token's spikes at T timesteps. Rows that timesteps share are added only once.
//
// A neuron whose current hardly changes spikes regularly: at all timesteps, or at every second one. So up to four
// timesteps form a tree: the root is all of them, below it are the even and the odd ones, and the leaves are single
// timesteps. An input that spikes at all timesteps of a node is listed at that node and nowhere below, and a node's sum
// starts from that of its parent:
//
//     sum(root) = bias + rows(root);   sum(node) = sum(parent) + rows(node);   y[t] = sum(leaf of t)
//
// More than four timesteps form several trees. The order of a sum depends only on the sequence's own spikes, not on
// other sequences nor on threads.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX512)
constexpr int MOST_VECTORS = 8;  // three sums of this size are in registers together, of 32
#else
constexpr int MOST_VECTORS = 4;  // of 16
#endif
constexpr int TREE = 4;  // timesteps of a tree

// A node of a tree of T <= TREE timesteps is the timesteps First, First + Stride, ... < T. It comes before its children
// (First, 2 Stride) and (First + Stride, 2 Stride); a node of a single timestep has none.
template <int T, int First = 0, int Stride = 1>
constexpr bool is_leaf = First + Stride >= T;

// The lists of inputs: those of the trees' nodes one after another, each ascending and ending where `ends` says.
struct SpikeLists {
  uint16_t* entries;
  int32_t* ends;  // [nodes of all trees]
};

// Lists the inputs of a node and those below it, from n words per timestep: first the bits that are set at all
// timesteps of the node, which it then clears.
template <int T, int First = 0, int Stride = 1>
void list_node(uint64_t* words, int64_t row, int64_t n, const SpikeLists& lists, int64_t& node, int64_t& end) {
  for (int64_t w = 0; w < n; w++) {
    uint64_t shared = words[First * row + w];
    if constexpr (!is_leaf<T, First, Stride>) {
      for (int t = First + Stride; t < T; t += Stride) shared &= words[t * row + w];
      for (int t = First; t < T; t += Stride) words[t * row + w] &= ~shared;
    }
    end += indices_of(shared, static_cast<uint16_t>(64 * w), lists.entries + end);
  }
  lists.ends[node++] = static_cast<int32_t>(end);
  if constexpr (!is_leaf<T, First, Stride>) {
    list_node<T, First, 2 * Stride>(words, row, n, lists, node, end);
    list_node<T, First + Stride, 2 * Stride>(words, row, n, lists, node, end);
  }
}

// Lists the set bits of `words` [T, row], of which n words per timestep are read; clears bits that timesteps share.
SPIKEDECODER_OUTLINE void list_spikes(uint64_t* words, int64_t T, int64_t row, int64_t n, const SpikeLists& lists) {
  int64_t node = 0, end = 0;
  for (int64_t t = 0; t < T; t += TREE, words += TREE * row) {
    switch (T - t) {
      case 1: list_node<1>(words, row, n, lists, node, end); break;
      case 2: list_node<2>(words, row, n, lists, node, end); break;
      case 3: list_node<3>(words, row, n, lists, node, end); break;
      default: list_node<TREE>(words, row, n, lists, node, end);
    }
  }
}

// V vectors of columns of a panel. The squares of their sums are added to `squares` [T, W].
struct Strip {
  const float *panel, *bias;
  int64_t width;  // of the panel's rows
  float* squares;
};

// A position in the lists.
struct Place {
  const uint16_t* entry;
  const int32_t* ends;
};

// V vectors, each a variable of its own: the compiler keeps them in registers, as it would not with an array.
template <int V>
struct Sums {
  F first;
  Sums<V - 1> rest;

  SPIKEDECODER_INLINE_MEMBER void read(const float* from) {
    first = load(from);
    rest.read(from + W);
  }
  SPIKEDECODER_INLINE_MEMBER void add_row(const float* row) {
    first = add(first, load(row));
    rest.add_row(row + W);
  }
  SPIKEDECODER_INLINE_MEMBER void write(float* to) const {
    store(to, first);
    rest.write(to + W);
  }
  SPIKEDECODER_INLINE_MEMBER F add_squares(F total) const { return rest.add_squares(fma(first, first, total)); }
};
template <>
struct Sums<0> {
  SPIKEDECODER_INLINE_MEMBER void read(const float*) {}
  SPIKEDECODER_INLINE_MEMBER void add_row(const float*) {}
  SPIKEDECODER_INLINE_MEMBER void write(float*) const {}
  SPIKEDECODER_INLINE_MEMBER F add_squares(F total) const { return total; }
};

// Adds a node's rows to `sums`, then does the nodes below it, or stores a leaf's sums at y[t]. Returns where the next
// node begins.
template <int V, int T, int First = 0, int Stride = 1>
SPIKEDECODER_INLINE Place sum_node(const Strip& strip, Sums<V> sums, Place at, const uint16_t* entries, float* y,
                                   int64_t row, float* squares) {
  for (const uint16_t* const end = entries + *at.ends++; at.entry < end; at.entry++) {
    sums.add_row(strip.panel + *at.entry * strip.width);
  }
  if constexpr (is_leaf<T, First, Stride>) {
    sums.write(y + First * row);
    store(squares + First * W, sums.add_squares(load(squares + First * W)));
  } else {
    at = sum_node<V, T, First, 2 * Stride>(strip, sums, at, entries, y, row, squares);
    at = sum_node<V, T, First + Stride, 2 * Stride>(strip, sums, at, entries, y, row, squares);
  }
  return at;
}

template <int V, int T>
Place sum_tree(const Strip& strip, Place at, const uint16_t* entries, float* y, int64_t row, float* squares) {
  Sums<V> bias;
  bias.read(strip.bias);
  return sum_node<V, T>(strip, bias, at, entries, y, row, squares);
}

// y [T, row] = the sums of all timesteps.
template <int V>
void sum_trees(const Strip& strip, const SpikeLists& lists, int64_t T, float* y, int64_t row) {
  Place at{lists.entries, lists.ends};
  float* squares = strip.squares;
  for (int64_t t = 0; t < T; t += TREE, y += TREE * row, squares += TREE * W) {
    switch (T - t) {
      case 1: at = sum_tree<V, 1>(strip, at, lists.entries, y, row, squares); break;
      case 2: at = sum_tree<V, 2>(strip, at, lists.entries, y, row, squares); break;
      case 3: at = sum_tree<V, 3>(strip, at, lists.entries, y, row, squares); break;
      default: at = sum_tree<V, TREE>(strip, at, lists.entries, y, row, squares);
    }
  }
}

using SumTrees = void (*)(const Strip&, const SpikeLists&, int64_t, float*, int64_t);

template <int V>
SumTrees sum_trees_of(int64_t vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? sum_trees<V> : sum_trees_of<V - 1>(vectors);
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
