// XLA FFI handlers and the plain C functions Python calls: check, decode, hand to the kernels, nothing else.
#include <optional>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using cmjax::Matrix;
using cmjax::Type;

namespace {

std::optional<Type> TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Type::kF32;
    case ffi::DataType::BF16: return Type::kBF16;
    case ffi::DataType::S8: return Type::kS8;
    default: return std::nullopt;
  }
}

cmjax::Helpers HelpersOf(ffi::ThreadPool pool, bool is_parallel) {
  // The calling thread is one of the pool's.
  const int count = is_parallel ? static_cast<int>(pool.num_threads()) - 1 : 0;
  return {count, [pool](std::function<void()> run) mutable { pool.Schedule(std::move(run)); }};
}

// Operands of every handler in turn; a missing or unknown one is remembered.
class Operands {
 public:
  explicit Operands(const ffi::RemainingArgs& args) : args_(args) {}

  ffi::AnyBuffer Next() {
    auto buffer = args_.get<ffi::AnyBuffer>(at_++);
    if (!buffer) {
      bad_ = true;
      return *args_.get<ffi::AnyBuffer>(0);
    }
    return *buffer;
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
    const int64_t size = matrix.out * matrix.in;
    if (index < 0 || (index + count) * size > static_cast<int64_t>(values.element_count())) {
      bad_ = true;
      return matrix;
    }
    matrix.data = static_cast<const char*>(values.untyped_data()) + index * size * cmjax::ItemBytes(matrix.type);
    if (matrix.type == Type::kS8) matrix.scale = static_cast<const float*>(Next().untyped_data()) + index * matrix.out;
    return matrix;
  }

  bool ok() const { return !bad_; }

 private:
  const ffi::RemainingArgs& args_;
  size_t at_ = 0;
  bool bad_ = false;
};

int64_t Scalar(const ffi::AnyBuffer& buffer) { return *static_cast<const int32_t*>(buffer.untyped_data()); }

ffi::Error Wrong(const char* message) { return ffi::Error::InvalidArgument(message); }

cmjax::Rows RowsOf(const ffi::AnyBuffer& x, Type type, int64_t width, int64_t scale_at) {
  return {static_cast<const char*>(x.untyped_data()), x.dimensions()[1] * cmjax::ItemBytes(type), width, type, nullptr,
          scale_at};
}

// x [rows, in], layer, w [..., out, in], [scales of w], [scales of x] -> [rows, out]
ffi::Error Product(ffi::ThreadPool pool, bool is_parallel, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Operands operands(args);
  ffi::AnyBuffer x = operands.Next();
  const Matrix w = operands.NextMatrix(Scalar(operands.Next()), 1);
  auto result = rets.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(x);
  if (!operands.ok() || !result || !type || x.dimensions().size() != 2) return Wrong("cmjax_kernels: operands");
  const auto target_type = TypeOf(**result);
  if (!target_type || *target_type == Type::kS8) return Wrong("cmjax_kernels: type of the result");
  if (x.dimensions()[1] != w.in) return Wrong("cmjax_kernels: widths differ");
  cmjax::Rows rows = RowsOf(x, *type, w.in, 0);
  if (*type == Type::kS8) {
    rows.scales = static_cast<const float*>(operands.Next().untyped_data());
    if (!operands.ok()) return Wrong("cmjax_kernels: operands");
  }
  const cmjax::Target target{static_cast<char*>((*result)->untyped_data()), w.out, *target_type};
  cmjax::RunProduct(rows, x.dimensions()[0], w, *target_type, target, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// messages [rows, width], counts [experts], layer, w13 [layers, experts, 2f, hidden], [its scales],
// w2 [layers, experts, hidden, f], [its scales] -> [rows, hidden]
ffi::Error Experts(ffi::ThreadPool pool, bool is_parallel, int32_t scale_at, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  Operands operands(args);
  ffi::AnyBuffer messages = operands.Next(), counts = operands.Next();
  const int64_t layer = Scalar(operands.Next()), count = counts.element_count();
  cmjax::Experts experts{operands.NextMatrix(layer * count, count), operands.NextMatrix(layer * count, count), count};
  auto result = rets.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(messages);
  if (!operands.ok() || !result || !type) return Wrong("cmjax_kernels: operands");
  const auto target_type = TypeOf(**result);
  if (!target_type || *target_type == Type::kS8) return Wrong("cmjax_kernels: type of the result");
  const int64_t hidden = experts.w2.out;
  if (experts.w13.in != hidden || experts.w13.out != 2 * experts.w2.in || messages.dimensions()[1] < hidden) {
    return Wrong("cmjax_kernels: widths differ");
  }
  const auto* sizes = static_cast<const int32_t*>(counts.untyped_data());
  int64_t total = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (sizes[e] < 0) return Wrong("cmjax_kernels: a negative number of rows");
    total += sizes[e];
  }
  if (total > messages.dimensions()[0]) return Wrong("cmjax_kernels: more rows than the buffer has");
  const cmjax::Target target{static_cast<char*>((*result)->untyped_data()), hidden, *target_type};
  cmjax::RunExperts(RowsOf(messages, *type, hidden, scale_at), sizes, experts, target, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("scale_at")
                                  .RemainingArgs()
                                  .RemainingRets());

// Plain C, for ctypes.
extern "C" {
const char* cmjax_kernels_form() { return cmjax::CurrentForm().name; }
int32_t cmjax_kernels_use(const char* name) { return cmjax::UseForm(name) ? 1 : 0; }
}
