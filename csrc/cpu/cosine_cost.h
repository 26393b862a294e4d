// The costs of the two ways of the cosine form: from the Gram matrix of an image, or from its pooled patches.
#pragma once

#include "params.h"

namespace {

using namespace pacl;

// Costs of an image with `rows` patches, in multiply-adds of float32. `speed` is that of bfloat16 products in them.
// Measured on AVX-512, the better way by these numbers was the faster one wherever they differ by more than a tenth.
struct CosineCost {
  double rows, texts, dim;
  bool backward;

  CosineCost(const CompatibilityParams& p, int64_t patches)
      : rows((double)patches),
        texts((double)(p.text_count < 1024 ? p.text_count : 1024)),  // a forward's task computes G for 1,024 texts
        dim((double)p.dim),
        backward(p.grad_phi || p.loss_sums) {}

  // Scores, pooled patches; in the backward also their direction's scores, their part of the gradient, W's products.
  double pooled() const { return (backward ? 6 : 2) * rows * texts * dim; }

  // `attention` is the cost of a multiply-add of q = G a, which stays float32. A forward's G and q are triangles, whose
  // tiles are a quarter slower.
  double gram(double speed, double attention) const {
    const double scores = rows * texts * dim, matrix = rows * rows;
    if (!backward) return scores / speed + 1.25 * matrix * (dim / 2 / speed + texts / 2 * attention);
    return (3 * scores + 1.5 * matrix * dim + matrix * texts / 2) / speed + matrix * texts * attention;
  }
};

}  // namespace
