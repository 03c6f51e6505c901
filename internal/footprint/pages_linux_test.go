package footprint

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const smaps = `00400000-01a00000 r-xp 00000000 fe:00 12                     /bin/traffic-manager
Size:              22528 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me 
01a00000-03000000 r--p 01600000 fe:00 12                     /bin/traffic-manager
Size:              22528 kB
Anonymous:             0 kB
Swap:                  0 kB
SwapPss:               0 kB
03000000-03100000 r--p 02c00000 fe:00 12                     /bin/traffic-manager
Size:               1024 kB
Anonymous:            12 kB
Swap:                  0 kB
03100000-03200000 rw-p 02d00000 fe:00 12                     /bin/traffic-manager
Size:               1024 kB
Anonymous:             0 kB
Swap:                  0 kB
03200000-03300000 r--p 02e00000 fe:00 12                     /bin/traffic-manager
Size:               1024 kB
Anonymous:             0 kB
Swap:                  4 kB
c000000000-c000400000 rw-p 00000000 00:00 0 
Size:               4096 kB
Anonymous:             0 kB
Swap:                  0 kB
7f0000000000-7f0000001000 r--p 00000000 fe:00 13                     /bin/traffic-manager (deleted)
Anonymous:             0 kB
Swap:                  0 kB
`

func TestUnwritten(t *testing.T) {
	if got, want := unwritten(smaps, "/bin/traffic-manager"), []addrRange{{0x400000, 0x1a00000}, {0x1a00000, 0x3000000}}; !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	if got, want := unwritten(smaps, "/bin/traffic-manager (deleted)"), []addrRange{{0x7f0000000000, 0x7f0000001000}}; !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

// fileKiB is how much of files this process has in memory.
func fileKiB(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "RssFile:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Skip("the kernel does not say RssFile")
	return 0
}

func TestForgetProgram(t *testing.T) {
	exe, err := os.ReadFile("/proc/self/exe") // which is not its memory
	if err != nil {
		t.Fatal(err)
	}
	before := fileKiB(t)
	if err := forgetProgram(); err != nil {
		t.Fatal(err)
	}
	after := fileKiB(t)
	t.Logf("a program of %d KiB: %d KiB in memory, then %d", len(exe)>>10, before, after)
	if after >= before {
		t.Errorf("%d KiB in memory before, %d after", before, after)
	}
}
