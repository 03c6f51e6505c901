package footprint

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// forgetProgram has this process forget the pages of its own program, which the kernel keeps as the file's and gives again when they are used: most of
// what a start touches, the registration of thousands of types above all, is never needed again, and would count as this process's memory for ever.
func forgetProgram() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return err
	}
	for _, r := range unwritten(string(smaps), exe) {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, r.start, r.end-r.start, unix.MADV_DONTNEED); errno != 0 {
			return os.NewSyscallError("madvise", errno)
		}
	}
	return nil
}

type addrRange struct{ start, end uintptr }

// unwritten are the mappings of a file, out of proc_pid_smaps(5), that have nothing but what is in the file: none may write to them, nor ever did, as a loader
// does that sets addresses. Pages that were written are anonymous ones, or were until they went to the swap device.
func unwritten(smaps, file string) (out []addrRange) {
	var r addrRange
	written := false
	for line := range strings.Lines(smaps) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		if start, end, ok := strings.Cut(f[0], "-"); ok {
			a, err1 := strconv.ParseUint(start, 16, 64)
			b, err2 := strconv.ParseUint(end, 16, 64)
			r, written = addrRange{uintptr(a), uintptr(b)}, false
			if len(f) < 6 || strings.Join(f[5:], " ") != file || f[1][1] != '-' || err1 != nil || err2 != nil {
				r = addrRange{}
			}
		}
		switch f[0] {
		case "Anonymous:":
			written = f[1] != "0"
		case "Swap:": // comes after it
			if f[1] == "0" && !written && r.end > 0 {
				out = append(out, r)
			}
		}
	}
	return out
}
