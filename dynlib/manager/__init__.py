"""The runtime manager: what a policy sees, and the policy that plans and paces."""
