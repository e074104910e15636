"""Graph capture, regional torch.compile and ahead-of-time kernel builds: knows callables and shapes, no model.

Installed as `reducio_fast.compile`. Only relative imports inside this folder.
"""
