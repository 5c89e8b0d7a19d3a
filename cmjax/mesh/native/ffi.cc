// XLA FFI handlers and the plain C functions Python calls: decode, hand to Fabric, nothing else.
#include <cstring>

#include "fabric.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using cmjax::Buffers;
using cmjax::Call;
using cmjax::Collective;
using cmjax::Fabric;
using cmjax::Ticket;

namespace {

cmjax::Sum SumOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::S8: return cmjax::Sum::kS8;
    case ffi::DataType::U8: return cmjax::Sum::kU8;
    case ffi::DataType::S16: return cmjax::Sum::kS16;
    case ffi::DataType::U16: return cmjax::Sum::kU16;
    case ffi::DataType::S32: return cmjax::Sum::kS32;
    case ffi::DataType::U32: return cmjax::Sum::kU32;
    case ffi::DataType::S64: return cmjax::Sum::kS64;
    case ffi::DataType::U64: return cmjax::Sum::kU64;
    case ffi::DataType::BF16: return cmjax::Sum::kBF16;
    case ffi::DataType::F16: return cmjax::Sum::kF16;
    case ffi::DataType::F32: return cmjax::Sum::kF32;
    case ffi::DataType::F64: return cmjax::Sum::kF64;
    default: return cmjax::Sum::kNone;
  }
}

ffi::Future Failed(const std::string& message) {
  ffi::Promise promise;
  promise.SetError(ffi::Error(ffi::ErrorCode::kInternal, message));
  return ffi::Future(promise);
}

// Operands of every handler: place, [token], operand, [output, 4 index arrays], and whatever fixes the order.
Call MakeCall(int64_t run_id, int32_t device, std::string_view channel, std::string_view plane, int32_t collective,
              int32_t num_ranks, ffi::Span<const int64_t> pairs, ffi::AnyBuffer place, ffi::AnyBuffer operand,
              const ffi::RemainingArgs& args, size_t first_index) {
  Call call;
  call.run_id = run_id;
  call.channel = channel;
  call.plane = plane;
  call.collective = static_cast<Collective>(collective);
  const int32_t where = *static_cast<const int32_t*>(place.untyped_data());
  call.group = where / num_ranks;
  call.rank = where % num_ranks;
  call.num_ranks = num_ranks;
  call.device = device;
  call.dtype = static_cast<int32_t>(operand.element_type());
  call.item_bytes = ffi::ByteWidth(operand.element_type());
  call.sum = SumOf(operand.element_type());
  call.dims = operand.dimensions().begin();
  call.num_dims = operand.dimensions().size();
  call.pairs = pairs.begin();
  call.num_pairs = pairs.size();
  if (call.collective == Collective::kRaggedAllToAll) {
    ffi::AnyBuffer index = *args.get<ffi::AnyBuffer>(first_index);  // all four are of one length and type
    call.num_updates = index.dimensions()[0] / num_ranks;
    call.wide_index = index.element_type() == ffi::DataType::S64;
  }
  return call;
}

Buffers MakeBuffers(Collective collective, ffi::AnyBuffer operand, ffi::AnyBuffer result,
                    const ffi::RemainingArgs& args, size_t first_index) {
  Buffers buffers;
  buffers.source = static_cast<const char*>(operand.untyped_data());
  buffers.target = static_cast<char*>(result.untyped_data());
  if (collective == Collective::kRaggedAllToAll) {
    buffers.target_rows = result.dimensions()[0];
    for (size_t i = 0; i < 4; ++i) buffers.index[i] = args.get<ffi::AnyBuffer>(first_index + i)->untyped_data();
  }
  return buffers;
}

cmjax::Completion Fulfil(ffi::Promise promise) {
  return [promise = std::move(promise)](const std::string* error) mutable {
    if (error != nullptr) {
      promise.SetError(ffi::Error(ffi::ErrorCode::kInternal, *error));
    } else {
      promise.SetAvailable();
    }
  };
}

ffi::Future Enter(ffi::RunId run, int32_t device, std::string_view channel, std::string_view plane,
                  int32_t collective, int32_t num_ranks, ffi::Span<const int64_t> pairs, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  auto place = args.get<ffi::AnyBuffer>(0), operand = args.get<ffi::AnyBuffer>(1);
  auto result = rets.get<ffi::AnyBuffer>(0);
  if (!place || !operand || !result) return Failed("cmjax_fabric: missing operands");
  Call call = MakeCall(run.run_id, device, channel, plane, collective, num_ranks, pairs, *place, *operand, args, 3);
  Buffers buffers = MakeBuffers(call.collective, *operand, **result, args, 3);
  ffi::Promise promise;
  ffi::Future future(promise);
  Fabric::Get().Enter(call, buffers, Fulfil(std::move(promise)));
  return future;
}

ffi::Error Start(ffi::RunId run, int32_t device, std::string_view channel, std::string_view plane,
                 int32_t collective, int32_t num_ranks, ffi::Span<const int64_t> pairs, ffi::RemainingArgs args,
                 ffi::RemainingRets rets) {
  auto place = args.get<ffi::AnyBuffer>(0), operand = args.get<ffi::AnyBuffer>(1);
  auto token = rets.get<ffi::AnyBuffer>(0);
  if (!place || !operand || !token) return ffi::Error::InvalidArgument("cmjax_fabric: missing operands");
  Call call = MakeCall(run.run_id, device, channel, plane, collective, num_ranks, pairs, *place, *operand, args, 2);
  Ticket ticket;
  if (auto error = Fabric::Get().Start(call, &ticket)) return ffi::Error(ffi::ErrorCode::kInternal, *error);
  std::memcpy((*token)->untyped_data(), &ticket, sizeof(ticket));
  return ffi::Error::Success();
}

ffi::Future Done(int32_t device, std::string_view channel, std::string_view plane, int32_t collective,
                 int32_t num_ranks, ffi::Span<const int64_t> pairs, ffi::RemainingArgs args,
                 ffi::RemainingRets rets) {
  auto place = args.get<ffi::AnyBuffer>(0), token = args.get<ffi::AnyBuffer>(1);
  auto operand = args.get<ffi::AnyBuffer>(2);
  auto result = rets.get<ffi::AnyBuffer>(0);
  if (!place || !token || !operand || !result) return Failed("cmjax_fabric: missing operands");
  Ticket ticket;
  std::memcpy(&ticket, token->untyped_data(), sizeof(ticket));
  Call call =
      MakeCall(ticket.run_id, device, channel, plane, collective, num_ranks, pairs, *place, *operand, args, 4);
  Buffers buffers = MakeBuffers(call.collective, *operand, **result, args, 4);
  ffi::Promise promise;
  ffi::Future future(promise);
  Fabric::Get().Finish(ticket, call, buffers, Fulfil(std::move(promise)));
  return future;
}

// Results are memory as it was (or aliased operands); operands only fix the order.
ffi::Error Nothing(ffi::RemainingArgs, ffi::RemainingRets) { return ffi::Error::Success(); }

// As Nothing, but gives its thread to whatever else is ready before what comes next: where devices outnumber threads,
// every device's start is before any device's work.
ffi::Future Yield(ffi::RemainingArgs, ffi::RemainingRets) {
  ffi::Promise promise;
  ffi::Future future(promise);
  Fabric::Get().Later(Fulfil(std::move(promise)));
  return future;
}

}  // namespace

#define CMJAX_FABRIC_ATTRS()                                                                           \
  Ctx<ffi::DeviceOrdinal>()                                                                            \
      .Attr<std::string_view>("channel")                                                               \
      .Attr<std::string_view>("plane")                                                                 \
      .Attr<int32_t>("collective")                                                                     \
      .Attr<int32_t>("num_ranks")                                                                      \
      .Attr<ffi::Span<const int64_t>>("pairs")                                                         \
      .RemainingArgs()                                                                                 \
      .RemainingRets()

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fabric_enter, Enter, ffi::Ffi::Bind().Ctx<ffi::RunId>().CMJAX_FABRIC_ATTRS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fabric_start, Start, ffi::Ffi::Bind().Ctx<ffi::RunId>().CMJAX_FABRIC_ATTRS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fabric_done, Done, ffi::Ffi::Bind().CMJAX_FABRIC_ATTRS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fabric_yield, Yield, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fabric_nothing, Nothing, ffi::Ffi::Bind().RemainingArgs().RemainingRets());

// Plain C, for ctypes.
extern "C" {

void cmjax_fabric_set_timeout(double seconds) { Fabric::Get().SetTimeout(seconds); }
void cmjax_fabric_set_delay(const char* plane, double latency_s, double bytes_per_s) {
  Fabric::Get().SetDelay(plane, latency_s, bytes_per_s);
}
void cmjax_fabric_clear_delays() { Fabric::Get().ClearDelays(); }
int64_t cmjax_fabric_num_live() { return Fabric::Get().num_live(); }
int32_t cmjax_fabric_num_threads() { return Fabric::Get().num_threads(); }

using Entries = std::vector<cmjax::TrafficEntry>;

void* cmjax_traffic_snapshot() { return new Entries(Fabric::Get().traffic().Snapshot()); }
void cmjax_traffic_free(void* snapshot) { delete static_cast<Entries*>(snapshot); }
void cmjax_traffic_reset() { Fabric::Get().traffic().Reset(); }
int64_t cmjax_traffic_size(void* snapshot) { return static_cast<int64_t>(static_cast<Entries*>(snapshot)->size()); }
const char* cmjax_traffic_plane(void* snapshot, int64_t i) {
  return (*static_cast<Entries*>(snapshot))[i].plane.c_str();
}
const char* cmjax_traffic_collective(void* snapshot, int64_t i) {
  return cmjax::CollectiveName(static_cast<Collective>((*static_cast<Entries*>(snapshot))[i].collective));
}
int64_t cmjax_traffic_calls(void* snapshot, int64_t i) { return (*static_cast<Entries*>(snapshot))[i].calls; }
double cmjax_traffic_modelled_s(void* snapshot, int64_t i) { return (*static_cast<Entries*>(snapshot))[i].modelled_s; }
double cmjax_traffic_exposed_s(void* snapshot, int64_t i) { return (*static_cast<Entries*>(snapshot))[i].exposed_s; }

// One more than the largest device ordinal seen.
int32_t cmjax_traffic_num_devices(void* snapshot) {
  int32_t count = 0;
  for (auto& entry : *static_cast<Entries*>(snapshot)) {
    for (auto& block : entry.blocks) {
      for (int32_t device : block->devices) count = device >= count ? device + 1 : count;
    }
  }
  return count;
}

// Adds bytes[source * num_devices + target].
void cmjax_traffic_bytes(void* snapshot, int64_t i, int32_t num_devices, int64_t* bytes) {
  for (auto& block : (*static_cast<Entries*>(snapshot))[i].blocks) {
    const size_t ranks = block->devices.size();
    for (size_t s = 0; s < ranks; ++s) {
      for (size_t d = 0; d < ranks; ++d) {
        int64_t cell = block->bytes_per_pair;
        if (block->cells) cell += block->cells[d * ranks + s].load(std::memory_order_relaxed);
        bytes[int64_t{block->devices[s]} * num_devices + block->devices[d]] += cell;
      }
    }
  }
}

// Copies `bytes` between two buffers with as many threads as an exchange uses: the bound a bench compares with.
void cmjax_fabric_memcpy(char* target, const char* source, int64_t bytes) {
  cmjax::Pool& pool = Fabric::Get().pool();
  std::mutex mutex;
  std::condition_variable ready;
  bool finished = false;
  const int parts = pool.num_threads() * 8;
  pool.Run(
      parts,
      [=](int part) {
        const int64_t first = bytes * part / parts, last = bytes * (part + 1) / parts;
        std::memcpy(target + first, source + first, last - first);
      },
      [&] {
        std::lock_guard<std::mutex> lock(mutex);
        finished = true;
        ready.notify_one();
      });
  std::unique_lock<std::mutex> lock(mutex);
  ready.wait(lock, [&] { return finished; });
}

}  // extern "C"
