"""The efficient pure-torch form of each op: the CPU path, the one that exports, and the one for torch.func."""
