// Lets PyTorch built without CUDA trace fake tensors that say they are on one: a device guard that guards nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
