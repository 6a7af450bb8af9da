// y [O] = weight [O, I] · x [I], what `slm::matrix_vector` is in a compiled step, whose library this
// becomes a part of. Weights are fp32 or bf16, x and y fp32.
//
// The product takes as long as reading the matrix. So four rows are read at a time, each with a sum
// of its own, while the next four are fetched. A thread that is done sooner, since the other's core
// has other work too, takes more of them (guided).
AOTITorchError aoti_torch_cpu_matrix_vector(
    AtenTensorHandle weight_handle,
    AtenTensorHandle x_handle,
    int64_t threads,
    AtenTensorHandle* result)
{
  using namespace slm;
  // Rows at a time, and what a thread takes at the least before it looks for more.
  constexpr int64_t ROWS = 4, LEAST_BYTES = 192 * 1024;

  int64_t* sizes = nullptr;
  int32_t dtype = 0;
  void *weight_data = nullptr, *x_data = nullptr, *y_data = nullptr;
  aoti_torch_get_sizes(weight_handle, &sizes);
  aoti_torch_get_dtype(weight_handle, &dtype);
  aoti_torch_get_data_ptr(weight_handle, &weight_data);
  aoti_torch_get_data_ptr(x_handle, &x_data);
  const int64_t outputs = sizes[0], inputs = sizes[1], one = 1;
  const AOTITorchError failed = aoti_torch_empty_strided(
      1, &outputs, &one, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, result);
  if (failed) return failed;
  aoti_torch_get_data_ptr(*result, &y_data);
  const float* x = static_cast<const float*>(x_data);
  float* y = static_cast<float*>(y_data);

  const auto product = [&](const auto* weight) {
    const int64_t whole = inputs - inputs % LANES;
    const auto row = [&](int64_t o) __attribute__((always_inline)) {
      const auto* w = weight + o * inputs;
      Floats sums = {};
      for (int64_t i = 0; i < whole; i += LANES) sums += load(x + i) * load(w + i);
      float sum = total(sums);
      for (int64_t i = whole; i < inputs; ++i) sum += x[i] * value(w + i);
      y[o] = sum;
    };
    const auto rows = [&](int64_t o) __attribute__((always_inline)) {
      const auto *a = weight + o * inputs, *b = a + inputs, *c = b + inputs, *d = c + inputs;
      const int64_t ahead = ROWS * inputs;
      Floats sum_a = {}, sum_b = {}, sum_c = {}, sum_d = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        __builtin_prefetch(a + i + ahead);
        __builtin_prefetch(b + i + ahead);
        __builtin_prefetch(c + i + ahead);
        __builtin_prefetch(d + i + ahead);
        const Floats inputs_here = load(x + i);
        sum_a += inputs_here * load(a + i);
        sum_b += inputs_here * load(b + i);
        sum_c += inputs_here * load(c + i);
        sum_d += inputs_here * load(d + i);
      }
      y[o] = total(sum_a), y[o + 1] = total(sum_b), y[o + 2] = total(sum_c), y[o + 3] = total(sum_d);
      for (int64_t i = whole; i < inputs; ++i) {
        y[o] += x[i] * value(a + i), y[o + 1] += x[i] * value(b + i);
        y[o + 2] += x[i] * value(c + i), y[o + 3] += x[i] * value(d + i);
      }
    };
    const int64_t blocks = outputs / ROWS;
    const int64_t block_bytes = ROWS * inputs * static_cast<int64_t>(sizeof(*weight));
    const int64_t least_blocks = std::max<int64_t>(1, LEAST_BYTES / block_bytes);
    #pragma omp parallel for schedule(guided, least_blocks) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) rows(block * ROWS);
    for (int64_t o = blocks * ROWS; o < outputs; ++o) row(o);
  };
  if (dtype == aoti_torch_dtype_float32()) {
    product(static_cast<const float*>(weight_data));
  } else {
    product(static_cast<const uint16_t*>(weight_data));
  }
  return 0;
}
