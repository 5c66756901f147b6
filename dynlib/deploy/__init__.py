"""On the device: bundles that serve without torch, and the manager as a service."""
