/* A CUDA runtime without a GPU, for torch's host code: it answers what torch asks, with one sort of device, an
 * H100 with 80 GB, as often as FAKE_CUDA_DEVICES says. Streams and events are names only: each piece of work
 * is done before anyone waits for it. What would need a GPU (memory on it, copies, kernels) ends the process.
 *
 * cuda_on_cpu.py loads it before torch, so that the linker finds these functions before those of the real
 * runtime. What is not here comes from the real one, which has no device. Nvidia's own headers, which come
 * with torch, check each signature.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIGABYTE (1ul << 30)
#define UNAVAILABLE(name, parameters)                                              \
    cudaError_t name parameters {                                                  \
        fprintf(stderr, #name ": real memory or a real kernel of a GPU\n");        \
        abort();                                                                   \
    }
#define DOES_NOTHING(name, parameters) \
    cudaError_t name parameters { return cudaSuccess; }

#undef cudaGetDeviceProperties
#undef cudaEventRecord
#undef cudaStreamIsCapturing

static _Thread_local int current_device;
static char a_stream, an_event, a_context; /* their addresses are what torch holds as such */

/* Devices */
cudaError_t cudaGetDeviceCount(int *count) {
    *count = atoi(getenv("FAKE_CUDA_DEVICES"));
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "Fake H100");
    properties->major = 9;
    properties->totalGlobalMem = 80 * GIGABYTE;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 227 << 10;
    properties->sharedMemPerMultiprocessor = 228 << 10;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->multiProcessorCount = 132;
    properties->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = 0;
    if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
    if (attribute == cudaDevAttrMultiProcessorCount) *value = 132;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *unused = 60 * GIGABYTE;
    *total = 80 * GIGABYTE;
    return cudaSuccess;
}
DOES_NOTHING(cudaDeviceSynchronize, (void))
DOES_NOTHING(cudaGetLastError, (void))
DOES_NOTHING(cudaPeekAtLastError, (void))

/* Streams and events */
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)&a_stream;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)&an_event;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 0;
    return cudaSuccess;
}
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode *mode))
DOES_NOTHING(cudaStreamDestroy, (cudaStream_t stream))
DOES_NOTHING(cudaStreamQuery, (cudaStream_t stream))
DOES_NOTHING(cudaStreamSynchronize, (cudaStream_t stream))
DOES_NOTHING(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags))
DOES_NOTHING(cudaEventDestroy, (cudaEvent_t event))
DOES_NOTHING(cudaEventRecord, (cudaEvent_t event, cudaStream_t stream))
DOES_NOTHING(cudaEventRecordWithFlags, (cudaEvent_t event, cudaStream_t stream, unsigned flags))
DOES_NOTHING(cudaEventQuery, (cudaEvent_t event))
DOES_NOTHING(cudaEventSynchronize, (cudaEvent_t event))

/* Pinned memory: ordinary memory, of which it is known that it was asked for as pinned */
static struct { char *start; size_t size; } pinned[4096];
static int pinned_blocks;

cudaError_t cudaHostAlloc(void **block, size_t size, unsigned flags) {
    if (pinned_blocks == 4096 || posix_memalign(block, 4096, size)) return cudaErrorMemoryAllocation;
    pinned[pinned_blocks].start = *block;
    pinned[pinned_blocks++].size = size;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *block) {
    for (int i = 0; i < pinned_blocks; i++)
        if (pinned[i].start == block) pinned[i].size = 0;
    free(block);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->device = -2;
    for (int i = 0; i < pinned_blocks; i++)
        if ((char *)pointer >= pinned[i].start && (char *)pointer < pinned[i].start + pinned[i].size)
            attributes->type = cudaMemoryTypeHost;
    return cudaSuccess;
}

/* The driver, which torch asks for by the names of its functions */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)&a_context;
    return CUDA_SUCCESS;
}

/* What only a GPU can do */
UNAVAILABLE(cudaMalloc, (void **memory, size_t size))
UNAVAILABLE(cudaMallocAsync, (void **memory, size_t size, cudaStream_t stream))
UNAVAILABLE(cudaMemcpy, (void *to, const void *from, size_t size, enum cudaMemcpyKind kind))
UNAVAILABLE(cudaMemcpyAsync, (void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                              cudaStream_t stream))
UNAVAILABLE(cudaMemset, (void *memory, int value, size_t size))
UNAVAILABLE(cudaMemsetAsync, (void *memory, int value, size_t size, cudaStream_t stream))
UNAVAILABLE(__cudaLaunchKernel, (cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                cudaStream_t stream))
UNAVAILABLE(cudaLaunchKernelExC, (const cudaLaunchConfig_t *launch, const void *kernel, void **arguments))
UNAVAILABLE(cudaGraphLaunch, (cudaGraphExec_t graph, cudaStream_t stream))
