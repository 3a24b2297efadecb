"""The qcow2 image format, versions 2 and 3, after QEMU's docs/interop/qcow2.rst.

Every number in an image is big-endian and nobody's word: a module here lets out values that are in
bounds, or `ImageError`.
"""
