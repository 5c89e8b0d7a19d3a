// What the FFI handlers have in common: types and sizes of buffers, and the threads that help.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <thread>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

inline std::optional<Type> TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Type::kF32;
    case ffi::DataType::BF16: return Type::kBF16;
    case ffi::DataType::S8: return Type::kS8;
    default: return std::nullopt;
  }
}

inline Helpers HelpersOf(ffi::ThreadPool pool, bool is_parallel) {
  if (!is_parallel) return {0, nullptr};
  // The calling thread is one of the pool's. A pool of hundreds of devices has more threads than there are cores.
  static const int64_t cores = std::thread::hardware_concurrency();
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), cores)) - 1;
  return {static_cast<int>(count), [pool](std::function<void()> run) mutable { pool.Schedule(std::move(run)); }};
}

// Operands of every handler in turn; a missing or unknown one is remembered.
class Operands {
 public:
  explicit Operands(const ffi::RemainingArgs& args) : args_(args) {}

  ffi::AnyBuffer Next() {
    auto buffer = args_.get<ffi::AnyBuffer>(at_++);
    if (!buffer) {
      bad_ = true;
      return *args_.get<ffi::AnyBuffer>(0);  // there is a first one: the handlers ask
    }
    return *buffer;
  }

  // Scales, `count` of them.
  const float* NextScales(int64_t count) {
    ffi::AnyBuffer scales = Next();
    if (TypeOf(scales) != Type::kF32 || static_cast<int64_t>(scales.element_count()) != count) bad_ = true;
    return static_cast<const float*>(scales.untyped_data());
  }

  int64_t NextIndex() {
    ffi::AnyBuffer index = Next();
    if (index.element_type() != ffi::DataType::S32 || index.element_count() != 1) {
      bad_ = true;
      return -1;
    }
    return *static_cast<const int32_t*>(index.untyped_data());
  }

  // Matrix `index` of a stack `[..., out, in]`, and of its scales where it is of int8.
  Matrix NextMatrix(int64_t index, int64_t count) {
    ffi::AnyBuffer values = Next();
    const auto dims = values.dimensions();
    Matrix matrix{};
    const auto type = TypeOf(values);
    if (!type || dims.size() < 2) {
      bad_ = true;
      return matrix;
    }
    matrix.type = *type;
    matrix.out = dims[dims.size() - 2];
    matrix.in = dims[dims.size() - 1];
    const int64_t size = matrix.out * matrix.in, all = static_cast<int64_t>(values.element_count());
    if (index < 0 || (index + count) * size > all) {
      bad_ = true;
      return matrix;
    }
    matrix.data = static_cast<const char*>(values.untyped_data()) + index * size * ItemBytes(matrix.type);
    if (matrix.type == Type::kS8 && matrix.in > 0) matrix.scale = NextScales(all / matrix.in) + index * matrix.out;
    return matrix;
  }

  bool ok() const { return !bad_; }

 private:
  const ffi::RemainingArgs& args_;
  size_t at_ = 0;
  bool bad_ = false;
};

inline bool HasValues(const ffi::AnyBuffer& buffer, int64_t count, std::optional<Type> type) {
  return static_cast<int64_t>(buffer.element_count()) == count && TypeOf(buffer) == type;
}

inline int64_t Scalar(const ffi::AnyBuffer& buffer) { return *static_cast<const int32_t*>(buffer.untyped_data()); }

inline ffi::Error Wrong(const char* message) { return ffi::Error::InvalidArgument(message); }

inline Rows RowsOf(const ffi::AnyBuffer& x, Type type, int64_t width, int64_t scale_at) {
  return {static_cast<const char*>(x.untyped_data()), x.dimensions()[1] * ItemBytes(type), width, type, nullptr,
          scale_at};
}

}  // namespace
}  // namespace cmjax
