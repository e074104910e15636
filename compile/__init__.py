"""Graph capture, regional torch.compile and ahead-of-time kernel builds, of any callables: nothing here names a model.

Installed as `reducio_fast.compile`. Only relative imports inside this folder.
"""
