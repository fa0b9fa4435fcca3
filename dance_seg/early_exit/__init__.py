"""When to stop computing: networks with several exits, and who leaves at which (RANet, BasisNet, multi-stage networks).

`ExitNetwork` is what such a network looks like; its `exits` is lazy, and leaving the loop over it is the saving.
"""
