// Norms and a router's choices, of one form: part of form.cc.
#pragma once

void Norm(const Rows& rows, int64_t row, const char* weight, Type weight_type, float eps, const Target& target,
          float* floats) {
  constexpr int64_t kLanes = 16;
  const int64_t width = rows.width, whole = width / kLanes * kLanes;
  ReadRow(rows, row, Type::kF32, floats);
  float lanes[kLanes] = {}, sum = 0.0f;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = MulAdd(floats[i + lane], floats[i + lane], lanes[lane]);
  }
  for (int64_t i = whole; i < width; ++i) sum = MulAdd(floats[i], floats[i], sum);
  for (const float lane : lanes) sum += lane;
  const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; ++i) floats[i] *= inverse;
  if (weight_type == Type::kF32) {
    for (int64_t i = 0; i < width; ++i) floats[i] *= reinterpret_cast<const float*>(weight)[i];
  } else {
    for (int64_t i = 0; i < width; ++i) floats[i] *= Widen(reinterpret_cast<const uint16_t*>(weight)[i]);
  }
  WriteRow(floats, width, target.type, target.data + row * target.width * ItemBytes(target.type));
}

// Integers in the order of the floats they stand for, NaN above all, and back. None is kTaken.
constexpr int32_t kTaken = -2147483647 - 1;

inline int32_t KeyOf(float x) {
  const uint32_t bits = BitsOf(x), size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fffffff;
  return static_cast<int32_t>(bits == size ? bits : bits ^ 0x7fffffff);
}

inline float ValueOf(int32_t key) { return FloatOf(static_cast<uint32_t>(key < 0 ? key ^ 0x7fffffff : key)); }

inline int32_t Largest(const int32_t* keys, int64_t count) {
  int32_t most = kTaken;
  for (int64_t i = 0; i < count; ++i) most = keys[i] > most ? keys[i] : most;
  return most;
}

// The first of the largest, which is taken.
inline int64_t TakeLargest(int32_t* keys, int64_t count) {
  const int32_t most = Largest(keys, count);
  int64_t at = 0;
  while (keys[at] != most) ++at;
  keys[at] = kTaken;
  return at;
}

// The sum of the two largest, or the one there is.
inline float BestTwo(const int32_t* keys, int64_t count) {
  const int32_t most = Largest(keys, count);
  int32_t second = kTaken;
  int64_t times = 0;
  for (int64_t i = 0; i < count; ++i) {
    times += keys[i] == most;
    second = keys[i] != most && keys[i] > second ? keys[i] : second;
  }
  if (times > 1) second = most;
  const bool is_one = second == kTaken || second == KeyOf(-__builtin_inff());
  return ValueOf(most) + (is_one ? 0.0f : ValueOf(second));
}

inline void Scores(const Router& router, const float* logits, float* scores) {
  const int64_t experts = router.experts;
  if (!router.is_softmax) {
    for (int64_t e = 0; e < experts; ++e) scores[e] = Sigmoid(logits[e]);
    return;
  }
  float most = logits[0], sum = 0.0f;
  for (int64_t e = 1; e < experts; ++e) most = logits[e] > most ? logits[e] : most;
  for (int64_t e = 0; e < experts; ++e) scores[e] = Exp(logits[e] - most);
  for (int64_t e = 0; e < experts; ++e) sum += scores[e];
  for (int64_t e = 0; e < experts; ++e) scores[e] /= sum;
}

void Choose(const Router& router, const float* logits, int32_t* slots, float* weights, char* scratch) {
  const int64_t experts = router.experts, size = experts / router.groups;
  auto* scores = reinterpret_cast<float*>(scratch);
  auto* keys = reinterpret_cast<int32_t*>(scores + Padded(experts));
  int32_t* groups = keys + Padded(experts);
  Scores(router, logits, scores);
  for (int64_t e = 0; e < experts; ++e) keys[e] = KeyOf(router.bias == nullptr ? scores[e] : scores[e] + router.bias[e]);
  if (router.groups > 1) {
    for (int64_t g = 0; g < router.groups; ++g) {
      const int32_t* own = keys + g * size;
      groups[g] = router.by_best_two ? KeyOf(BestTwo(own, size)) : Largest(own, size);
    }
    for (int64_t k = 0; k < router.topk_groups; ++k) TakeLargest(groups, router.groups);
    // Those of other groups come after all of these, and can still be chosen where these are too few.
    for (int64_t g = 0; g < router.groups; ++g) {
      if (groups[g] == kTaken) continue;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) keys[e] = KeyOf(-__builtin_inff());
    }
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < router.topk; ++k) {
    const int64_t expert = TakeLargest(keys, experts);
    slots[k] = router.expert_to_slot[expert];
    weights[k] = scores[expert];
    sum += weights[k];
  }
  for (int64_t k = 0; k < router.topk; ++k) {
    weights[k] = (router.is_normalized ? weights[k] / (sum + 1e-20f) : weights[k]) * router.scale;
  }
  for (int64_t s = 0; s < router.shared; ++s) {
    slots[router.topk + s] = router.expert_to_slot[experts + s];
    weights[router.topk + s] = 1.0f;
  }
}
