package ns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/state"
)

func itoa(n int) string { return strconv.Itoa(n) }

// startTime reads field 22 of a /proc/PID/stat file; see proc_pid_stat(5). A zombie counts as gone.
func startTime(statPath string) (uint64, error) {
	b, err := os.ReadFile(statPath)
	if err != nil {
		return 0, err
	}
	// The second field is the command in parentheses and may itself hold spaces and parentheses.
	_, rest, ok := cutLast(string(b), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("%s: unexpected content", statPath)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// Identify returns the process that has the id now.
func Identify(pid int) (state.Process, error) {
	start, err := startTime("/proc/" + itoa(pid) + "/stat")
	return state.Process{PID: pid, Start: start}, err
}

// Alive says whether exactly this process still runs.
func Alive(p state.Process) bool {
	if p.PID <= 0 {
		return false
	}
	now, err := Identify(p.PID)
	return err == nil && now == p
}

// AliveInside says whether a process runs, given by its id inside the holder's namespaces.
func AliveInside(holder, p state.Process) bool {
	if !Alive(holder) || p.PID <= 0 {
		return false
	}
	start, err := startTime(procPath(holder, "root/proc/"+itoa(p.PID)+"/stat"))
	return err == nil && start == p.Start
}

// ReapedInside says whether nothing is left of a process, given as for AliveInside. The first thread of a killed program is a zombie while
// others, which still have its sockets open, end.
func ReapedInside(holder, p state.Process) bool {
	path := procPath(holder, "root/proc/"+itoa(p.PID)+"/stat")
	if start, err := startTime(path); err == nil {
		return start != p.Start
	}
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// open returns a descriptor of exactly this process.
func open(p state.Process) (int, error) {
	if p.PID <= 0 {
		return -1, unix.ESRCH
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	// Checked after opening: the descriptor cannot change its process any more.
	if !Alive(p) {
		unix.Close(fd)
		return -1, fmt.Errorf("process %d: %w", p.PID, unix.ESRCH)
	}
	return fd, nil
}

// Kill ends the holder and with it everything in its namespaces, and waits until that is done. A process that is
// already gone is no error.
func Kill(p state.Process, patience time.Duration) error {
	fd, err := open(p)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	// A pidfd becomes readable when its process has ended; an init ends after all others of its PID namespace.
	deadline := time.Now().Add(patience)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("process %d has not ended %s after SIGKILL", p.PID, patience)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		}
		if n > 0 {
			return nil
		}
	}
}
