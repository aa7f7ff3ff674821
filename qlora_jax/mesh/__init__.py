"""One run on several devices.

axes      how many devices, and what each axis of them divides
rules     which array is cut along which of its axes
gather    parts of an array from all devices
shards    what a model does where it holds a part of each array: gather, look up, sum
tensor    products that devices compute together, and the layout of weights for them
sequence  rows whose tokens are several devices'
place     arrays onto the devices of a mesh
processes several processes that train one model: who holds its folder, what they tell each other
failures  what one process fails of ends all, in its words
turns     who reads which array, and how its parts come to the devices that hold them
wire      bytes between devices, counted in a compiled program
"""
