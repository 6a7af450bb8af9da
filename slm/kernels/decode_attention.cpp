// y [B, H, K] = softmax(q k / sqrt(K)) v of one query per row, q [B, H, K], over the first
// lengths [B] places of k, v [B, N, G, K]: what `slm::decode_attention_cpu` is in a compiled step,
// whose library this becomes a part of. Keys and values are fp32 or bf16, q and y fp32.
//
// Keys and values are read once. Each thread has a share of every row's places and keeps a softmax
// of its own as it goes, a block of places after the other, while the next one is fetched; the
// shares are put together at the end (Flash-Decoding, Dao et al. 2023). R = H / G.
AOTITorchError aoti_torch_cpu_decode_attention_cpu(
    AtenTensorHandle q_handle,
    AtenTensorHandle k_handle,
    AtenTensorHandle v_handle,
    AtenTensorHandle lengths_handle,
    int64_t threads,
    AtenTensorHandle* result)
{
  using namespace slm;
  // Places in a block: whole vectors of scores, and keys that stay in the first cache.
  constexpr int64_t BLOCK = 16;
  // What is worth a second thread, and then all of them: threads that a smaller team leaves out end,
  // and the next larger one has to start them again.
  constexpr int64_t LEAST_BYTES = 192 * 1024;
  // The score of no place.
  constexpr float NOTHING = -std::numeric_limits<float>::infinity();

  int64_t *q_sizes = nullptr, *k_sizes = nullptr, *k_strides = nullptr, *v_strides = nullptr;
  int32_t dtype = 0;
  void *q_data = nullptr, *k_data = nullptr, *v_data = nullptr, *lengths_data = nullptr;
  void* y_data = nullptr;
  aoti_torch_get_sizes(q_handle, &q_sizes);
  aoti_torch_get_sizes(k_handle, &k_sizes);
  aoti_torch_get_strides(k_handle, &k_strides);
  aoti_torch_get_strides(v_handle, &v_strides);
  aoti_torch_get_dtype(k_handle, &dtype);
  aoti_torch_get_data_ptr(q_handle, &q_data);
  aoti_torch_get_data_ptr(k_handle, &k_data);
  aoti_torch_get_data_ptr(v_handle, &v_data);
  aoti_torch_get_data_ptr(lengths_handle, &lengths_data);
  const int64_t B = q_sizes[0], H = q_sizes[1], K = q_sizes[2], N = k_sizes[1], G = k_sizes[2];
  const int64_t R = H / G, strides[] = {H * K, K, 1};
  const AOTITorchError failed = aoti_torch_empty_strided(
      3, q_sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, result);
  if (failed) return failed;
  aoti_torch_get_data_ptr(*result, &y_data);
  const float* q = static_cast<const float*>(q_data);
  const int64_t* lengths = static_cast<const int64_t*>(lengths_data);
  float* y = static_cast<float*>(y_data);

  const int64_t whole = K - K % LANES;
  const float scale = 1 / std::sqrt(static_cast<float>(K));
  const auto places = [&](int64_t b) { return std::min(lengths[b], N); };
  const auto attend = [&](const auto* k, const auto* v) {
    int64_t bytes = 0;
    for (int64_t b = 0; b < B; ++b) bytes += places(b) * G * K * 2 * sizeof(*k);
    const int64_t shares = bytes < LEAST_BYTES ? 1 : threads;
    // Of each share and query: the largest score, the sum of weights, the weighted values.
    std::vector<float> best(shares * B * H, NOTHING);
    std::vector<float> weights(shares * B * H), sums(shares * B * H * K);

    // Scores of four places.
    const auto score = [&](const float* query, const auto* k_a, const auto* k_b, const auto* k_c,
                           const auto* k_d, float* scores) __attribute__((always_inline)) {
      Floats a = {}, b = {}, c = {}, d = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        const Floats query_here = load(query + i);
        a += query_here * load(k_a + i);
        b += query_here * load(k_b + i);
        c += query_here * load(k_c + i);
        d += query_here * load(k_d + i);
      }
      scores[0] = total(a), scores[1] = total(b), scores[2] = total(c), scores[3] = total(d);
      for (int64_t i = whole; i < K; ++i) {
        scores[0] += query[i] * value(k_a + i), scores[1] += query[i] * value(k_b + i);
        scores[2] += query[i] * value(k_c + i), scores[3] += query[i] * value(k_d + i);
      }
    };
    // sum += weights · values, of `count` places.
    const auto add = [&](float* sum, const float* weights, const auto* values, int64_t count,
                         int64_t stride) __attribute__((always_inline)) {
      int64_t i = 0;
      for (; i + 4 * LANES <= K; i += 4 * LANES) {
        float* to = sum + i;
        Floats a = load(to), b = load(to + LANES);
        Floats c = load(to + 2 * LANES), d = load(to + 3 * LANES);
        const auto* from = values + i;
        for (int64_t place = 0; place < count; ++place, from += stride) {
          const float weight = weights[place];
          a += weight * load(from);
          b += weight * load(from + LANES);
          c += weight * load(from + 2 * LANES);
          d += weight * load(from + 3 * LANES);
        }
        store(to, a), store(to + LANES, b), store(to + 2 * LANES, c), store(to + 3 * LANES, d);
      }
      for (; i < whole; i += LANES) {
        Floats a = load(sum + i);
        const auto* from = values + i;
        for (int64_t place = 0; place < count; ++place, from += stride) {
          a += weights[place] * load(from);
        }
        store(sum + i, a);
      }
      for (; i < K; ++i) {
        for (int64_t place = 0; place < count; ++place) {
          sum[i] += weights[place] * value(values + place * stride + i);
        }
      }
    };
    const auto fetch = [&](const auto* head) __attribute__((always_inline)) {
      for (int64_t i = 0; i < K; i += 64 / sizeof(*head)) __builtin_prefetch(head + i, 0, 2);
    };
    const auto multiply = [&](float* sum, float factor) __attribute__((always_inline)) {
      for (int64_t i = 0; i < K; ++i) sum[i] *= factor;
    };

    const auto share_of_row = [&](int64_t share, int64_t b) {
      const int64_t first = (share * B + b) * H;
      std::vector<float> scores(R * BLOCK);
      const int64_t end = places(b) * (share + 1) / shares;
      for (int64_t begin = places(b) * share / shares; begin < end; begin += BLOCK) {
        const int64_t count = std::min(BLOCK, end - begin);
        for (int64_t g = 0; g < G; ++g) {
          const auto* keys = k + b * k_strides[0] + begin * k_strides[1] + g * k_strides[2];
          const auto* values = v + b * v_strides[0] + begin * v_strides[1] + g * v_strides[2];
          for (int64_t place = 0; place < count; place += 4) {
            // Beyond the last place, the last one again; its scores are overwritten below.
            const auto key = [&](int64_t ahead) {
              return keys + std::min(place + ahead, count - 1) * k_strides[1];
            };
            const auto *k_a = key(0), *k_b = key(1), *k_c = key(2), *k_d = key(3);
            const int64_t next = BLOCK * k_strides[1];
            fetch(k_a + next), fetch(k_b + next), fetch(k_c + next), fetch(k_d + next);
            for (int64_t r = 0; r < R; ++r) {
              score(q + (b * H + g * R + r) * K, k_a, k_b, k_c, k_d, &scores[r * BLOCK + place]);
            }
          }
          for (int64_t place = 0; place < count; ++place) {
            fetch(values + (place + BLOCK) * v_strides[1]);
          }
          for (int64_t r = 0; r < R; ++r) {
            const int64_t at = first + g * R + r;
            float* row = &scores[r * BLOCK];
            for (int64_t place = count; place < BLOCK; ++place) row[place] = NOTHING;
            Floats best_of_row = Floats{} + best[at];
            for (int64_t place = 0; place < BLOCK; place += LANES) {
              best_of_row = larger(best_of_row, load(row + place) * scale);
            }
            const float new_best = largest(best_of_row);
            if (new_best > best[at]) {
              const float shrink = std::exp(best[at] - new_best);
              weights[at] *= shrink;
              multiply(&sums[at * K], shrink);
              best[at] = new_best;
            }
            Floats row_weights = {};
            for (int64_t place = 0; place < BLOCK; place += LANES) {
              const Floats here = exp_of_negative(load(row + place) * scale - new_best);
              store(row + place, here);
              row_weights += here;
            }
            weights[at] += total(row_weights);
            add(&sums[at * K], row, values, count, v_strides[1]);
          }
        }
      }
    };
    #pragma omp parallel for schedule(static, 1) num_threads(shares) if (shares > 1)
    for (int64_t share = 0; share < shares; ++share) {
      for (int64_t b = 0; b < B; ++b) share_of_row(share, b);
    }
    for (int64_t bh = 0; bh < B * H; ++bh) {
      float best_of_all = NOTHING, weight = 0;
      for (int64_t share = 0; share < shares; ++share) {
        best_of_all = std::max(best_of_all, best[share * B * H + bh]);
      }
      std::fill_n(y + bh * K, K, 0.0f);
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t at = share * B * H + bh;
        const float factor = std::exp(best[at] - best_of_all);
        weight += factor * weights[at];
        add(y + bh * K, &factor, &sums[at * K], 1, 0);
      }
      multiply(y + bh * K, 1 / weight);
    }
  };
  if (dtype == aoti_torch_dtype_float32()) {
    attend(static_cast<const float*>(k_data), static_cast<const float*>(v_data));
  } else {
    attend(static_cast<const uint16_t*>(k_data), static_cast<const uint16_t*>(v_data));
  }
  return 0;
}
