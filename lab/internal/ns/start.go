package ns

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/doppel-dev/doppel/lab/internal/state"
)

// HoldCommand is the hidden command of the program that becomes a holder.
const HoldCommand = "__hold"

const namespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC

// Start makes a set of namespaces. The holder does nothing before record has returned, and ends if the caller dies
// before that: so no holder is ever unrecorded.
func Start(spec Spec, logPath string, record func(state.Process) error) (state.Process, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return state.Process{}, err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", HoldCommand)
	cmd.Args[0] = "doppel-lab-holder"
	cmd.Dir, cmd.Stderr = "/", log
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: namespaces}
	in, err := cmd.StdinPipe()
	if err != nil {
		return state.Process{}, err
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return state.Process{}, err
	}
	defer out.Close()
	if err := cmd.Start(); err != nil {
		return state.Process{}, fmt.Errorf("start the holder of namespaces: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reaps the holder if it dies while we run; its orphans are reaped by the machine's init
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		return state.Process{}, err
	}
	if err := record(p); err != nil {
		return p, err
	}
	if err := json.NewEncoder(in).Encode(spec); err != nil {
		return p, fmt.Errorf("instruct the holder of namespaces: %w", err)
	}
	answer, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return p, errors.New("the holder of namespaces ended early")
	}
	if answer = strings.TrimSpace(answer); answer != "ok" {
		return p, fmt.Errorf("set up namespaces: %s", answer)
	}
	return p, nil
}
