package ns

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/doppel-dev/doppel/lab/internal/state"
)

// DetachCommand is the hidden command of the program that starts a server and leaves it to the holder.
const DetachCommand = "__detach"

// Detach starts a server inside the holder's namespaces with its output in logPath, and returns its id as seen inside.
//
// It starts our own program inside first, which starts the server and ends: so the kernel gives the server to the
// holder. A process started directly would keep a parent outside its PID namespace.
func Detach(holder state.Process, logPath string, env []string, argv ...string) (state.Process, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return state.Process{}, err
	}
	defer log.Close()
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return state.Process{}, err
	}
	defer self.Close()
	var out, errOut bytes.Buffer
	cmd := inside(self, append([]string{DetachCommand}, argv...)...)
	cmd.Env, cmd.Dir = env, "/"
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.ExtraFiles = []*os.File{log}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := Do(holder, All, cmd.Run); err != nil {
		return state.Process{}, fmt.Errorf("start %s: %w: %s", argv[0], err, strings.TrimSpace(errOut.String()))
	}
	var p state.Process
	if err := json.Unmarshal(out.Bytes(), &p); err != nil {
		return state.Process{}, fmt.Errorf("start %s: %w", argv[0], err)
	}
	return p, nil
}

// RunDetach is what DetachCommand does: descriptor 3 is the log, standard output takes the id of the new process.
func RunDetach(argv []string) error {
	log := os.NewFile(3, "log")
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		return fmt.Errorf("%s ended at once: %w", argv[0], err)
	}
	return json.NewEncoder(os.Stdout).Encode(p)
}
