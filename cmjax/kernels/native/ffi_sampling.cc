// The XLA FFI handler of sampling.
#include "ffi_operands.h"

namespace cmjax {
namespace {

using S32 = ffi::Buffer<ffi::S32>;

// logits [rows, vocabulary], words [requests, any], positions [rows], history [requests, any], drafts [requests, any] ->
// tokens [rows]
ffi::Error HandleSample(ffi::ThreadPool pool, bool is_parallel, int32_t width, int32_t first, int32_t num_bias,
                        int32_t num_stop, int32_t num_word_tokens, int32_t num_mask_bytes, int32_t not_finite,
                        int32_t nothing_allowed, ffi::Buffer<ffi::F32> logits, S32 words, S32 positions, S32 history,
                        S32 drafts, ffi::ResultBuffer<ffi::S32> tokens) {
  const auto shape = logits.dimensions();
  if (shape.size() != 2 || shape[1] < 1 || width < 1 || first < 0) return Wrong("cmjax_kernels: logits");
  const int64_t rows = shape[0], requests = rows / width;
  const auto width_of = [requests](const S32& buffer) {
    const auto dims = buffer.dimensions();
    return dims.size() == 2 && dims[0] == requests ? dims[1] : int64_t{-1};
  };
  const Sampler all{logits.typed_data(), words.typed_data(), positions.typed_data(), history.typed_data(),
                    drafts.typed_data(), shape[1], width, first, width_of(history), width_of(drafts),
                    width_of(words), num_bias, num_stop, num_word_tokens, num_mask_bytes, not_finite, nothing_allowed};
  const bool is_sized = num_bias >= 0 && num_stop >= 0 && num_word_tokens >= 0 && num_mask_bytes >= 0;
  const int64_t needed = kSettings + 2 * int64_t{num_bias} + num_stop + 2 * int64_t{num_word_tokens} +
                         (int64_t{num_mask_bytes} + 3) / 4 * 2;
  if (!is_sized || (all.num_words != 0 && all.num_words != needed) || all.longest < 0 || all.num_drafts < 0 ||
      (num_mask_bytes != 0 && int64_t{num_mask_bytes} * 8 < shape[1]) ||
      (all.longest > 0 && int64_t{first} + width - 1 > all.num_drafts) || rows != requests * width ||
      static_cast<int64_t>(positions.element_count()) != rows ||
      static_cast<int64_t>(tokens->element_count()) != rows) {
    return Wrong("cmjax_kernels: settings of requests");
  }
  RunSample(all, rows, tokens->typed_data(), HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace cmjax

namespace ffi = xla::ffi;
using S32 = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_sample, cmjax::HandleSample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("width")
                                  .Attr<int32_t>("first")
                                  .Attr<int32_t>("num_bias")
                                  .Attr<int32_t>("num_stop")
                                  .Attr<int32_t>("num_word_tokens")
                                  .Attr<int32_t>("num_mask_bytes")
                                  .Attr<int32_t>("not_finite")
                                  .Attr<int32_t>("nothing_allowed")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<S32>());
