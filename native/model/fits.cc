#include "model/fits.h"

#include <cmath>

#include "formats/format.h"

namespace codefuse {

namespace {

struct Range {
  float most, beyond;  // the greatest value; the least one that rounds to infinity, halfway to what would come next
};
Range range_of(DType act) { return act == DType::f16 ? Range{65504.f, 65520.f} : Range{3.38953139e38f, 3.39617752e38f}; }

// f(row, column, value) of every element
template <class F>
void each(const TensorView& t, const F& f) {
  HostMatrix m;
  m.format = t.element == Element::f32 ? Format::f32 : t.element == Element::f16 ? Format::f16 : Format::bf16;
  m.rows = t.shape[0], m.cols = t.shape.size() > 1 ? t.shape[1] : 1;
  m.data = t.data;
  m.stride = row_bytes(m.format, m.cols);
  std::vector<float> row(static_cast<size_t>(m.cols));
  for (int64_t r = 0; r < m.rows; ++r) {
    decode_row(m, r, row.data());
    for (int64_t c = 0; c < m.cols; ++c) f(r, c, row[size_t(c)]);
  }
}

// times: what a scale is multiplied by at most, whatever the codes are
void check(const Weights& files, const std::string& name, const TensorView& t, DType act, int times) {
  const Range range = range_of(act);
  each(t, [&](int64_t r, int64_t c, float value) {
    if (times == 1 ? !std::isfinite(value) || std::fabs(value) < range.beyond : value * float(times) <= range.most) return;
    throw LoadError(cat(files.directory(), "/", t.file, ": tensor ", name, " has ", value, " at [", r, t.shape.size() > 1 ? cat(", ", c) : "", "]",
                        times == 1 ? "" : cat(", so a weight may be ", value * float(times)), "; ", name_of(act), " holds at most ", range.most, ": use ",
                        act == DType::f16 ? "bfloat16 or " : "", "float32"));
  });
}

}  // namespace

void check_fits(const Weights& files, DType act) {
  if (act == DType::f32) return;
  for (const auto& [name, t] : files.tensors()) {
    if (t.format.empty()) {
      if (t.shape.size() == 2 && (t.element == Element::f32 || (t.element == Element::bf16 && act == DType::f16))) check(files, name, t, act, 1);
    } else if (act == DType::f16) {
      const std::string scale = name.substr(0, name.rfind('.')) + ".scale";
      if (const TensorView* s = files.find(scale)) check(files, scale, *s, act, t.format == name_of(Format::q8_row) ? 127 : 15);
    }
  }
}

}  // namespace codefuse
