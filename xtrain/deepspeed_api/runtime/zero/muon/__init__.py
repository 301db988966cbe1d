"""Import paths of `deepspeed.runtime.zero.muon`."""
