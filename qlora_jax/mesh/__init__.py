"""One run on several devices.

axes      how many devices, and what each axis of them divides
rules     which array is cut along which of its axes
gather    parts of an array from all devices
shards    what a model does where it holds a part of each array: gather, look up, sum
place     arrays onto the devices of a mesh
processes several processes that train one model: who holds its folder, what they tell each other
sequence  rows whose tokens are several devices'
wire      bytes between devices, counted in a compiled program
"""
