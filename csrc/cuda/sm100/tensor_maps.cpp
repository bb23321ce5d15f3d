#include "../sm90/tensor_maps.cpp"
