// The element types that the caller's tensors may have.
#pragma once

namespace pacl {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace pacl
