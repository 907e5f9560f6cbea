// Tensors of torch's CPU allocator, each at the end of its pages, with pages before and behind that nobody may touch.
// For LD_PRELOAD, by guarded_cuda.py. New memory is 0xff: NaN, or -1.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kTensors = 64 /* alignment that torch asks for */, kWord = 16 /* most that kernels count on */ };
static const size_t kSpace = (size_t)1 << 42;  // addresses, each used once

static char *space, *unused;
static uint32_t* pages_at;  // of the allocation that begins in this page of the space
static void (*plain_free)(void*);
static int (*plain_memalign)(void**, size_t, size_t);

static void* reserve(size_t bytes, int access) {
  return mmap(NULL, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

__attribute__((constructor)) static void start(void) {
  plain_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  plain_memalign = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  pages_at = reserve(kSpace / kPage * sizeof *pages_at, PROT_READ | PROT_WRITE);
  unused = reserve(kSpace, PROT_NONE);
  space = unused;
}

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  if (space == NULL || alignment != kTensors || bytes == 0) {
    if (plain_memalign == NULL) plain_memalign = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    return plain_memalign(out, alignment, bytes);
  }
  const size_t words = (bytes + kWord - 1) / kWord * kWord, whole = (words + kPage - 1) / kPage * kPage;
  char* const first = __sync_fetch_and_add(&unused, whole + kPage) + kPage;
  if (mprotect(first, whole, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  memset(first, 0xff, whole);
  pages_at[(first - space) / kPage] = whole / kPage;
  *out = first + whole - words;
  return 0;
}

void free(void* pointer) {
  char* const at = pointer;
  if (space != NULL && at >= space && at < space + kSpace) {
    char* const first = at - (at - space) % kPage;
    mmap(first, pages_at[(first - space) / kPage] * (size_t)kPage, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return;
  }
  if (plain_free == NULL) plain_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  plain_free(pointer);
}
