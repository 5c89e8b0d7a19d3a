// XLA FFI handlers and the plain C functions Python calls: check, decode, hand to the kernels, nothing else.
#include "ffi_operands.h"

namespace cmjax {
namespace {

// x [rows, in], layer, w [..., out, in], [scales of w], [scales of x] -> [rows, out]
ffi::Error HandleProduct(ffi::ThreadPool pool, bool is_parallel, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (args.size() == 0) return Wrong("cmjax_kernels: operands");
  Operands operands(args);
  ffi::AnyBuffer x = operands.Next();
  const Matrix w = operands.NextMatrix(operands.NextIndex(), 1);
  auto result = rets.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(x);
  if (!operands.ok() || !result || !type || x.dimensions().size() != 2) return Wrong("cmjax_kernels: operands");
  const auto target_type = TypeOf(**result);
  if (!target_type || *target_type == Type::kS8) return Wrong("cmjax_kernels: type of the result");
  const int64_t num_rows = x.dimensions()[0];
  if (x.dimensions()[1] != w.in || !HasValues(**result, num_rows * w.out, target_type)) {
    return Wrong("cmjax_kernels: widths differ");
  }
  Rows rows = RowsOf(x, *type, w.in, 0);
  if (*type == Type::kS8) {
    rows.scales = operands.NextScales(num_rows);
    if (!operands.ok()) return Wrong("cmjax_kernels: operands");
  }
  const Target target{static_cast<char*>((*result)->untyped_data()), w.out, *target_type};
  RunProduct(rows, num_rows, w, *target_type, target, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// messages [rows, width], counts [experts], layer, w13 [layers, experts, 2f, hidden], [its scales],
// w2 [layers, experts, hidden, f], [its scales] -> [rows, hidden]
ffi::Error HandleExperts(ffi::ThreadPool pool, bool is_parallel, int32_t scale_at, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  if (args.size() == 0) return Wrong("cmjax_kernels: operands");
  Operands operands(args);
  ffi::AnyBuffer messages = operands.Next(), counts = operands.Next();
  const int64_t layer = operands.NextIndex(), count = counts.element_count();
  Experts experts{operands.NextMatrix(layer * count, count), operands.NextMatrix(layer * count, count), count};
  auto result = rets.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(messages);
  if (!operands.ok() || !result || !type || messages.dimensions().size() != 2 ||
      counts.element_type() != ffi::DataType::S32) {
    return Wrong("cmjax_kernels: operands");
  }
  const auto target_type = TypeOf(**result);
  if (!target_type || *target_type == Type::kS8) return Wrong("cmjax_kernels: type of the result");
  const int64_t hidden = experts.w2.out, width = messages.dimensions()[1];
  if (experts.w13.in != hidden || experts.w13.out != 2 * experts.w2.in || width < hidden ||
      !HasValues(**result, messages.dimensions()[0] * hidden, target_type) ||
      (*type == Type::kS8 && (scale_at < 0 || scale_at + 4 > width))) {
    return Wrong("cmjax_kernels: widths differ");
  }
  const auto* sizes = static_cast<const int32_t*>(counts.untyped_data());
  int64_t total = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (sizes[e] < 0) return Wrong("cmjax_kernels: a negative number of rows");
    total += sizes[e];
  }
  if (total > messages.dimensions()[0]) return Wrong("cmjax_kernels: more rows than the buffer has");
  const Target target{static_cast<char*>((*result)->untyped_data()), hidden, *target_type};
  RunExperts(RowsOf(messages, *type, hidden, scale_at), sizes, experts, target, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// kv_b [layers, heads, nope + value, latent], where `layer` is the one.
std::optional<Mla> MlaOf(const ffi::AnyBuffer& kv_b, int64_t layer, int64_t nope, int64_t rope, float scale) {
  const auto dims = kv_b.dimensions();
  const auto type = TypeOf(kv_b);
  if (!type || *type == Type::kS8 || dims.size() != 4 || layer < 0 || layer >= dims[0] || nope < 0 || dims[2] < nope) {
    return std::nullopt;
  }
  const char* data = static_cast<const char*>(kv_b.untyped_data()) + layer * dims[1] * dims[2] * dims[3] * ItemBytes(*type);
  return Mla{data, dims[1], nope, rope, dims[2] - nope, dims[3], scale, *type};
}

// q_nope [tokens, heads, nope], q_pe [tokens, heads, rope], kv_b, layer -> [requests, rows, latent + rope]
ffi::Error HandleAbsorb(ffi::ThreadPool pool, bool is_parallel, ffi::AnyBuffer q_nope, ffi::AnyBuffer q_pe,
                  ffi::AnyBuffer kv_b, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> query) {
  if (q_nope.dimensions().size() != 3 || q_pe.dimensions().size() != 3) return Wrong("cmjax_kernels: queries");
  const int64_t tokens = q_nope.dimensions()[0], nope = q_nope.dimensions()[2], rope = q_pe.dimensions()[2];
  const auto mla = MlaOf(kv_b, Scalar(layer), nope, rope, 1.0f);
  if (!mla || !HasValues(q_nope, tokens * mla->heads * nope, mla->type) ||
      !HasValues(q_pe, tokens * mla->heads * rope, mla->type) ||
      !HasValues(*query, tokens * mla->heads * (mla->latent + rope), mla->type)) {
    return Wrong("cmjax_kernels: queries and kv_b");
  }
  RunAbsorb(*mla, static_cast<const char*>(q_nope.untyped_data()), static_cast<const char*>(q_pe.untyped_data()),
                   tokens, static_cast<char*>(query->untyped_data()), HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// query [requests, rows, width], peak, total [requests, rows], mixed [requests, rows, width], cache [layers, slots,
// width], layer, block table [requests, blocks], lengths [tokens] -> peak, total, mixed, which are the operands' memory
ffi::Error HandleAttend(ffi::ThreadPool pool, bool is_parallel, int32_t block_size, int32_t part, int32_t num_parts,
                  float scale, ffi::AnyBuffer query, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer,
                  ffi::AnyBuffer cache, ffi::AnyBuffer layer, ffi::Buffer<ffi::S32> table,
                  ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> peak, ffi::ResultBuffer<ffi::F32> total,
                  ffi::ResultBuffer<ffi::F32> mixed) {
  const auto shape = query.dimensions(), cached = cache.dimensions(), blocks = table.dimensions();
  const auto type = TypeOf(query);
  const int64_t tokens = lengths.element_count();
  if (shape.size() != 3 || cached.size() != 3 || blocks.size() != 2 || !type || *type == Type::kS8 ||
      TypeOf(cache) != type || cached[2] != shape[2] || blocks[0] != shape[0] || shape[0] == 0 ||
      tokens % shape[0] != 0 || tokens == 0 || shape[1] % (tokens / shape[0]) != 0 || block_size < 1 ||
      cached[1] < block_size || part < 0 || part >= num_parts) {
    return Wrong("cmjax_kernels: queries and cache");
  }
  const int64_t at = Scalar(layer), rows = shape[0] * shape[1];
  if (at < 0 || at >= cached[0] || static_cast<int64_t>(peak->element_count()) != rows ||
      static_cast<int64_t>(total->element_count()) != rows ||
      static_cast<int64_t>(mixed->element_count()) != rows * shape[2]) {
    return Wrong("cmjax_kernels: layer and state");
  }
  const int64_t heads = rows / tokens;
  const Mla mla{nullptr, heads, 0, 0, 0, shape[2], scale, *type};
  const char* data = static_cast<const char*>(cache.untyped_data()) + at * cached[1] * cached[2] * ItemBytes(*type);
  RunAttend(mla, {data, cached[1], block_size},
                   {table.typed_data(), lengths.typed_data(), shape[0], blocks[1], tokens}, part, num_parts,
                   static_cast<const char*>(query.untyped_data()),
                   {peak->typed_data(), total->typed_data(), mixed->typed_data()}, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// query [heads, rows, nope + rope], peak, total [heads, rows], mixed [heads, rows, value], kv_b, its layer, cache [layers,
// slots, latent + rope], its layer, block table [sequences, blocks], first rows, numbers of rows and first positions
// [sequences] -> peak, total, mixed, which are the operands' memory
ffi::Error HandleAttendExpanded(ffi::ThreadPool pool, bool is_parallel, int32_t nope, int32_t block_size, int32_t part,
                  int32_t num_parts, float scale, ffi::AnyBuffer query, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer,
                  ffi::AnyBuffer kv_b, ffi::AnyBuffer layer, ffi::AnyBuffer cache, ffi::AnyBuffer cache_layer,
                  ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> counts,
                  ffi::Buffer<ffi::S32> first_positions, ffi::ResultBuffer<ffi::F32> peak,
                  ffi::ResultBuffer<ffi::F32> total, ffi::ResultBuffer<ffi::F32> mixed) {
  const auto shape = query.dimensions(), cached = cache.dimensions(), blocks = table.dimensions();
  if (shape.size() != 3 || cached.size() != 3 || blocks.size() != 2) return Wrong("cmjax_kernels: queries and cache");
  const auto mla = MlaOf(kv_b, Scalar(layer), nope, shape[2] - nope, scale);
  const int64_t num_rows = shape[1], rows = shape[0] * num_rows, count = blocks[0], at = Scalar(cache_layer);
  if (!mla || mla->heads != shape[0] || mla->rope < 0 || TypeOf(query) != mla->type || TypeOf(cache) != mla->type ||
      cached[2] != mla->latent + mla->rope || at < 0 || at >= cached[0] || block_size < 1 || cached[1] < block_size ||
      part < 0 || part >= num_parts) {
    return Wrong("cmjax_kernels: queries and cache");
  }
  const auto has = [](const auto& buffer, int64_t size) { return static_cast<int64_t>(buffer.element_count()) == size; };
  if (!has(*peak, rows) || !has(*total, rows) || !has(*mixed, rows * mla->value) || !has(starts, count) ||
      !has(counts, count) || !has(first_positions, count)) {
    return Wrong("cmjax_kernels: state and sequences");
  }
  const Sequences sequences{table.typed_data(), starts.typed_data(), counts.typed_data(), first_positions.typed_data(),
                            count, blocks[1]};
  for (int64_t s = 0, end = 0; s < count; ++s) {
    const int64_t start = sequences.starts[s], own = sequences.counts[s];
    if (own <= 0) continue;
    if (start < end || start + own > num_rows || sequences.first_positions[s] < 0) {
      return Wrong("cmjax_kernels: a sequence beyond the queries, or over another");
    }
    end = start + own;
  }
  const char* data = static_cast<const char*>(cache.untyped_data()) + at * cached[1] * cached[2] * ItemBytes(mla->type);
  RunAttendExpanded(*mla, {data, cached[1], block_size}, sequences, num_rows, part, num_parts,
                    static_cast<const char*>(query.untyped_data()),
                    {peak->typed_data(), total->typed_data(), mixed->typed_data()}, HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

// total [requests, rows], mixed [requests, rows, latent + rope], kv_b, layer -> [tokens, heads * value]
ffi::Error HandleRelease(ffi::ThreadPool pool, bool is_parallel, int32_t nope, ffi::Buffer<ffi::F32> total,
                   ffi::Buffer<ffi::F32> mixed, ffi::AnyBuffer kv_b, ffi::AnyBuffer layer,
                   ffi::Result<ffi::AnyBuffer> out) {
  if (mixed.dimensions().size() != 3 || kv_b.dimensions().size() != 4) return Wrong("cmjax_kernels: state");
  const int64_t width = mixed.dimensions()[2], rows = total.element_count();
  const auto mla = MlaOf(kv_b, Scalar(layer), nope, width - kv_b.dimensions()[3], 1.0f);
  if (!mla || mla->rope < 0 || rows % mla->heads != 0 || static_cast<int64_t>(mixed.element_count()) != rows * width ||
      !HasValues(*out, rows * mla->value, mla->type)) {
    return Wrong("cmjax_kernels: state and kv_b");
  }
  RunRelease(*mla, {nullptr, total.typed_data(), mixed.typed_data()}, rows / mla->heads,
                    static_cast<char*>(out->untyped_data()), HelpersOf(pool, is_parallel));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace cmjax

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_product, cmjax::HandleProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_experts, cmjax::HandleExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("scale_at")
                                  .RemainingArgs()
                                  .RemainingRets());

using AnyBuffer = ffi::AnyBuffer;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_absorb, cmjax::HandleAbsorb,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_attend, cmjax::HandleAttend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("block_size")
                                  .Attr<int32_t>("part")
                                  .Attr<int32_t>("num_parts")
                                  .Attr<float>("scale")
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_attend_expanded, cmjax::HandleAttendExpanded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("nope")
                                  .Attr<int32_t>("block_size")
                                  .Attr<int32_t>("part")
                                  .Attr<int32_t>("num_parts")
                                  .Attr<float>("scale")
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_kernels_release, cmjax::HandleRelease,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("is_parallel")
                                  .Attr<int32_t>("nope")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>());

// Plain C, for ctypes.
extern "C" {
const char* cmjax_kernels_form() { return cmjax::CurrentForm().name; }
int32_t cmjax_kernels_use(const char* name) { return cmjax::UseForm(name) ? 1 : 0; }
// The numbers of the form's Tiling for matrices of a Type, and of what columns are laid side by side for at a time.
void cmjax_kernels_tiling(int32_t type, int64_t* out) {
  const cmjax::Tiling& own = cmjax::CurrentForm().tiling[type];
  const int64_t found[] = {own.step, own.tile_rows, own.many_rows, own.many_tile, own.is_read_in_place,
                           cmjax::kManyBlock, cmjax::kRowsBytes};
  std::copy(std::begin(found), std::end(found), out);
}
}
