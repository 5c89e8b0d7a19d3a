// Drives the fabric's core by itself, without XLA, which decides when a rank's call is made and owns the buffers.
// The first argument names what to do; test_fabric_alone.py says what is expected.
#include <cstdio>
#include <iostream>

#include "fabric.h"

namespace {

using cmjax::Fabric;

cmjax::Call MakeCall(cmjax::Collective collective, int64_t run_id, int num_ranks, int rank, const int64_t* dims) {
  cmjax::Call call;
  call.run_id = run_id, call.channel = "shared", call.plane = "ub", call.collective = collective;
  call.num_ranks = num_ranks, call.rank = rank, call.device = rank;
  call.item_bytes = 4, call.sum = cmjax::Sum::kS32, call.dims = dims, call.num_dims = 1;
  return call;
}

// Where the ranks' completions leave their errors; "" is success.
struct Outcome {
  explicit Outcome(int count) : errors(count) {}
  cmjax::Completion At(int i) {
    return [this, i](const std::string* error) {
      errors[i] = error ? *error : "";
      ++finished;
    };
  }
  void Wait() {
    while (finished < static_cast<int>(errors.size())) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  void Print() {
    for (auto& error : errors) std::printf("%s\n", error.c_str());
  }
  std::vector<std::string> errors;
  std::atomic<int> finished{0};
};

// Rank 0 enters, then rank 0 again, then rank 1.
void Twice() {
  const int64_t dims[] = {4};
  int32_t source[2][4] = {{1, 2, 3, 4}, {10, 20, 30, 40}}, target[2][4];
  Outcome outcome(3);
  int number = 0;
  for (int rank : {0, 0, 1}) {
    cmjax::Buffers buffers;
    buffers.source = reinterpret_cast<char*>(source[rank]), buffers.target = reinterpret_cast<char*>(target[rank]);
    const auto call = MakeCall(cmjax::Collective::kPsum, 7, 2, rank, dims);
    Fabric::Get().Enter(call, buffers, outcome.At(number++));
  }
  outcome.Wait();
  outcome.Print();
}

// Two ranks start; then somebody who counts eight ranks finishes with the ticket of the first.
void ForeignTicket() {
  const int64_t dims[] = {4};
  int32_t source[4] = {1, 2, 3, 4}, target[4];
  cmjax::Ticket tickets[2];
  for (int rank : {0, 1}) {
    Fabric::Get().Start(MakeCall(cmjax::Collective::kPsum, 7, 2, rank, dims), &tickets[rank]);
  }
  cmjax::Buffers buffers;
  buffers.source = reinterpret_cast<char*>(source), buffers.target = reinterpret_cast<char*>(target);
  Outcome outcome(2);
  const auto foreign = MakeCall(cmjax::Collective::kPsum, 7, 8, 5, dims);
  Fabric::Get().Finish(tickets[0], foreign, buffers, outcome.At(0));
  const auto own = MakeCall(cmjax::Collective::kPsum, 7, 2, 1, dims);
  Fabric::Get().Finish(tickets[1], own, buffers, outcome.At(1));
  outcome.Wait();
  outcome.Print();
}

// Ragged exchanges from standard input: ranks, updates per peer, rows of an operand, rows of an output, rows of memory
// that stand before and after each output; then the four index arrays, each of all ranks. A row is an int32: operands
// count up from 1 over all ranks, outputs and what is around them count down from -1.
template <typename Index>
void Ragged(int64_t run_id) {
  int num_ranks, num_updates, rows_in, rows_out, margin;
  std::cin >> num_ranks >> num_updates >> rows_in >> rows_out >> margin;
  const int index_length = num_ranks * num_updates, rows_around = rows_out + 2 * margin;
  std::vector<Index> index[4];
  for (auto& array : index) {
    array.resize(num_ranks * index_length);
    for (auto& value : array) std::cin >> value;
  }
  std::vector<int32_t> operands(num_ranks * rows_in), outputs(num_ranks * rows_around);
  for (size_t i = 0; i < operands.size(); ++i) operands[i] = 1 + i;
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = -1 - i;
  const int64_t dims[] = {rows_in};
  Outcome outcome(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) {
    auto call = MakeCall(cmjax::Collective::kRaggedAllToAll, run_id, num_ranks, rank, dims);
    call.num_updates = num_updates, call.wide_index = sizeof(Index) == 8;
    cmjax::Buffers buffers;
    buffers.source = reinterpret_cast<char*>(&operands[rank * rows_in]);
    buffers.target = reinterpret_cast<char*>(&outputs[rank * rows_around + margin]);
    buffers.target_rows = rows_out;
    for (int i = 0; i < 4; ++i) buffers.index[i] = &index[i][rank * index_length];
    Fabric::Get().Enter(call, buffers, outcome.At(rank));
  }
  outcome.Wait();
  outcome.Print();
  for (int32_t value : outputs) std::printf("%d ", value);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "twice") Twice();
  if (what == "foreign-ticket") ForeignTicket();
  if (what == "ragged") {
    int index_bytes;
    for (int64_t run_id = 1; std::cin >> index_bytes; ++run_id) {
      index_bytes == 8 ? Ragged<int64_t>(run_id) : Ragged<int32_t>(run_id);
    }
    for (auto& entry : Fabric::Get().traffic().Snapshot()) std::printf("%ld\n", static_cast<long>(entry.calls));
  }
  return static_cast<int>(Fabric::Get().num_live());
}
