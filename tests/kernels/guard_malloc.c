// Preloaded into a test process: while guard_mode is not 0, every aligned allocation (torch's tensors, the kernels'
// scratch) is filled with 0xff, NaN in every floating type, and lies against a page that cannot be touched: it ends there
// (mode 1) or begins right behind it (mode 2). Freed memory cannot be touched either.
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };
static const size_t kRegion = (size_t)1 << 40;  // addresses are not reused: a stale pointer always faults
static char* region;
static size_t used;
static volatile int mode;

struct Header {  // alone on the page before the leading guard page
  size_t pages;
  char* data;
};

static size_t pages_of(size_t bytes) { return (bytes + kPage - 1) / kPage; }

void* guard_allocate(size_t bytes, int at_end) {
  const size_t pages = bytes ? pages_of(bytes) : 1;
  char* block = region + __atomic_fetch_add(&used, (pages + 3) * kPage, __ATOMIC_RELAXED);
  if (!region || block + (pages + 3) * kPage > region + kRegion) abort();
  char* data = block + 2 * kPage;
  if (mprotect(block, kPage, PROT_READ | PROT_WRITE) || mprotect(data, pages * kPage, PROT_READ | PROT_WRITE)) abort();
  memset(data, 0xff, pages * kPage);
  struct Header* header = (struct Header*)block;
  header->pages = pages;
  header->data = data;
  return at_end && bytes ? data + pages * kPage - bytes : data;
}

void guard_set_mode(int to) {
  if (!region) {
    region = mmap(NULL, kRegion, PROT_NONE, kFlags, -1, 0);
    if (region == MAP_FAILED) abort();
  }
  mode = to;
}

extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

void* aligned_alloc(size_t alignment, size_t bytes) {
  return mode ? guard_allocate(bytes, mode == 1) : __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = aligned_alloc(alignment, bytes);
  return *out ? 0 : ENOMEM;
}
void free(void* p) {
  char* at = p;
  if (!region || at < region || at >= region + kRegion) {
    __libc_free(p);
    return;
  }
  // The header is two pages before the first page of the data, which the pointer lies on.
  char* data = region + (size_t)(at - region) / kPage * kPage;
  struct Header* header = (struct Header*)(data - 2 * kPage);
  const size_t pages = header->pages;
  if (header->data != data) abort();
  // Mapped anew, so that it merges with its neighbours: a process may have only so many mappings.
  if (mmap(header, (pages + 2) * kPage, PROT_NONE, kFlags | MAP_FIXED, -1, 0) == MAP_FAILED) abort();
}
