/* The table that the kernels of event-driven inference share. */
#include "event_driven.h"

uint16_t bit_positions[256][8] __attribute__((aligned(16)));

__attribute__((constructor)) static void fill_bit_positions(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, n = 0; bit < 8; bit++)
            if (byte >> bit & 1) bit_positions[byte][n++] = (uint16_t)bit;
}
