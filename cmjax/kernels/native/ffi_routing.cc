// XLA FFI handlers of the operators around an exchange: norm, the router's choices, rows sorted by where they go.
#include "ffi_operands.h"

namespace cmjax {
namespace {

using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using ResultS32 = ffi::ResultBuffer<ffi::S32>;

bool HasSize(const S32& buffer, int64_t count) { return static_cast<int64_t>(buffer.element_count()) == count; }

// x [rows, width], weight [width] -> [rows, width]
ffi::Error HandleNorm(ffi::ThreadPool pool, bool is_parallel, float eps, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> result) {
  const auto type = TypeOf(x), weight_type = TypeOf(weight);
  if (!type || *type == Type::kS8 || !weight_type || *weight_type == Type::kS8 || x.dimensions().size() != 2) {
    return Wrong("cmjax_kernels: rows and weight");
  }
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  if (!HasValues(weight, width, weight_type) || !HasValues(*result, num_rows * width, type)) {
    return Wrong("cmjax_kernels: widths differ");
  }
  RunNorm(RowsOf(x, *type, width, 0), num_rows, static_cast<const char*>(weight.untyped_data()), *weight_type, eps,
          {static_cast<char*>(result->untyped_data()), width, *type}, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// logits [tokens, experts], is_valid [tokens], expert_to_slot [experts + shared], bias [experts or none] ->
// slots, weights [tokens, topk + shared]
ffi::Error HandleChoose(ffi::ThreadPool pool, bool is_parallel, int32_t topk, int32_t groups, int32_t topk_groups,
                        int32_t is_softmax, int32_t by_best_two, int32_t is_normalized, float scale, F32 logits,
                        ffi::Buffer<ffi::PRED> is_valid, S32 expert_to_slot, F32 bias, ResultS32 slots,
                        ffi::ResultBuffer<ffi::F32> weights) {
  if (logits.dimensions().size() != 2) return Wrong("cmjax_kernels: logits");
  const int64_t tokens = logits.dimensions()[0], experts = logits.dimensions()[1];
  const int64_t shared = static_cast<int64_t>(expert_to_slot.element_count()) - experts;
  const int64_t num_bias = bias.element_count(), width = topk + shared;
  if (static_cast<int64_t>(is_valid.element_count()) != tokens || shared < 0 || (num_bias != 0 && num_bias != experts) ||
      !HasSize(*slots, tokens * width) || static_cast<int64_t>(weights->element_count()) != tokens * width) {
    return Wrong("cmjax_kernels: sizes of a router");
  }
  if (topk < 1 || topk > experts || groups < 1 || experts % groups != 0 || topk_groups < 1 || topk_groups > groups) {
    return Wrong("cmjax_kernels: choices of a router");
  }
  const Router router{num_bias == 0 ? nullptr : bias.typed_data(), expert_to_slot.typed_data(), experts, shared, topk,
                      groups, topk_groups, is_softmax != 0, by_best_two != 0, is_normalized != 0, scale};
  RunChoose(router, logits.typed_data(), reinterpret_cast<const uint8_t*>(is_valid.typed_data()), tokens,
            slots->typed_data(), weights->typed_data(), HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// x [tokens, hidden], slots [tokens, topk] -> packed [tokens * topk, width], position [tokens, topk], offsets and
// counts [ranks, local], announced [ranks, 2, local]
ffi::Error HandlePack(ffi::ThreadPool pool, bool is_parallel, int32_t scale_at, ffi::AnyBuffer x, S32 slots,
                      ffi::Result<ffi::AnyBuffer> packed, ResultS32 position, ResultS32 offsets, ResultS32 counts,
                      ResultS32 announced) {
  const auto type = TypeOf(x), target_type = TypeOf(*packed);
  const auto shape = slots.dimensions(), told = announced->dimensions(), rows = packed->dimensions();
  if (!type || !target_type || x.dimensions().size() != 2 || shape.size() != 2 || told.size() != 3 || told[1] != 2 ||
      rows.size() != 2 || x.dimensions()[0] != shape[0] || rows[0] != shape[0] * shape[1]) {
    return Wrong("cmjax_kernels: rows and choices");
  }
  const int64_t hidden = x.dimensions()[1], num_slots = told[0] * told[2];
  const bool fits = scale_at < 0 ? *target_type == *type && rows[1] == hidden
                                 : *target_type == Type::kS8 && *type != Type::kS8 && scale_at >= hidden &&
                                       scale_at + 4 <= rows[1];
  if (!fits || !HasSize(*position, rows[0]) || !HasSize(*offsets, num_slots) || !HasSize(*counts, num_slots)) {
    return Wrong("cmjax_kernels: sizes of packed rows");
  }
  const Packed to{static_cast<char*>(packed->untyped_data()), rows[1] * ItemBytes(*target_type), scale_at,
                  position->typed_data(), offsets->typed_data(), counts->typed_data(), announced->typed_data()};
  RunPack(RowsOf(x, *type, hidden, 0), slots.typed_data(), shape[0], shape[1], told[0], told[2], to,
          HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// announced [ranks, 2, local] -> counts, source_offsets, offsets [ranks, local], totals [local]
ffi::Error HandleLayOut(ffi::ThreadPool, bool, S32 announced, ResultS32 counts, ResultS32 source_offsets,
                        ResultS32 offsets, ResultS32 totals) {
  const auto shape = announced.dimensions();
  if (shape.size() != 3 || shape[1] != 2) return Wrong("cmjax_kernels: announced rows");
  const int64_t size = shape[0] * shape[2];
  if (!HasSize(*counts, size) || !HasSize(*source_offsets, size) || !HasSize(*offsets, size) ||
      !HasSize(*totals, shape[2])) {
    return Wrong("cmjax_kernels: sizes of received rows");
  }
  RunLayOut(announced.typed_data(), shape[0], shape[2], counts->typed_data(), source_offsets->typed_data(),
            offsets->typed_data(), totals->typed_data());
  return ffi::Error::Success();
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("is_parallel"); }

}  // namespace
}  // namespace cmjax

namespace ffi = xla::ffi;
using S32 = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_norm, cmjax::HandleNorm,
                              cmjax::Bind()
                                  .Attr<float>("eps")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_choose, cmjax::HandleChoose,
                              cmjax::Bind()
                                  .Attr<int32_t>("topk")
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("topk_groups")
                                  .Attr<int32_t>("is_softmax")
                                  .Attr<int32_t>("by_best_two")
                                  .Attr<int32_t>("is_normalized")
                                  .Attr<float>("scale")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<S32>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<S32>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_pack, cmjax::HandlePack,
                              cmjax::Bind()
                                  .Attr<int32_t>("scale_at")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_lay_out, cmjax::HandleLayOut,
                              cmjax::Bind().Arg<S32>().Ret<S32>().Ret<S32>().Ret<S32>().Ret<S32>());
