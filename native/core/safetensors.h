// Weights on disk: safetensors files, mapped into memory and checked before a byte of a tensor is read.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/check.h"

namespace codefuse {

// A read-only mapping of a whole file.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // LoadError: the path and the system's reason
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool holds(const uint8_t* p) const { return p >= data_ && p < data_ + size_; }
  // The bytes that are mapped at `from`, without mapping pages for them: what is read once is cheaper so. LoadError.
  void read(uint8_t* to, const uint8_t* from, size_t bytes) const;

 private:
  const std::string path_;
  int fd_ = -1;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Maps the pages of [data, data + bytes) at once, where the system can: much cheaper than a fault for every few of them.
void populate(const uint8_t* data, size_t bytes);

enum class Element : uint8_t { f32, f16, bf16, i8, u8, i32 };

inline size_t size_of(Element e) { return e == Element::f32 || e == Element::i32 ? 4 : e == Element::f16 || e == Element::bf16 ? 2 : 1; }
const char* name_of(Element e);  // "F32": as in the files

struct TensorView {
  Element element = Element::f32;
  std::string format;             // weight format id from the file's metadata ("NAME.format"); empty: its elements are the values
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // row-major, any alignment
  std::string file;               // for messages
};

size_t bytes_of(const TensorView& t);
std::string shown_shape(const std::vector<int64_t>& shape);  // "[96, 32]"

struct WeightsFile {
  std::string name;          // in its directory
  std::string architecture;  // of its metadata; empty: it does not say
  MappedFile memory;
};

// Every tensor of the *.safetensors files of a directory. The mappings live as long as this.
class Weights {
 public:
  explicit Weights(const std::string& directory);  // LoadError: file, tensor, expected, found
  // Tensors that are in memory already; owner keeps what they point to.
  Weights(std::string directory, std::map<std::string, TensorView> tensors, std::shared_ptr<void> owner)
      : directory_(std::move(directory)), tensors_(std::move(tensors)), owner_(std::move(owner)) {}

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // nullptr if there is none of that name
  const TensorView* find(const std::string& name) const;
  // Checks the shape, and the element type if given; LoadError names file, tensor, expected and found.
  const TensorView& at(const std::string& name, const std::vector<int64_t>& shape) const;
  const TensorView& at(const std::string& name, const std::vector<int64_t>& shape, Element element) const;
  // LoadError names a tensor that is not in `used`: the model would not be the one that the files describe.
  void check_all_used(const std::set<std::string>& used) const;
  const std::string& directory() const { return directory_; }
  const std::vector<std::unique_ptr<WeightsFile>>& files() const { return files_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  // The file that is mapped at p; nullptr if p is elsewhere in memory.
  const WeightsFile* file_at(const uint8_t* p) const;

 private:
  void add_file(const std::string& path);

  std::string directory_;
  std::vector<std::unique_ptr<WeightsFile>> files_;
  std::map<std::string, TensorView> tensors_;
  std::shared_ptr<void> owner_;
};

// The whole text of a small file; LoadError.
std::string read_text(const std::string& path);

}  // namespace codefuse
