package laptop

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// ExecOptions say as whom a command runs on a laptop.
type ExecOptions struct {
	// As is the role in the cluster: admin or developer.
	As string
	// UID is the user on the laptop.
	UID int
	// BinDir is put at the front of PATH.
	BinDir string
}

// Exec runs a command on a laptop, with our standard streams and environment but for what makes it a laptop.
func Exec(lab *state.Lab, name string, o ExecOptions, argv []string, started func(*os.Process)) error {
	l, err := Get(lab, name)
	if err != nil {
		return err
	}
	file, ok := kubeconfigs()[o.As]
	if !ok {
		return fmt.Errorf("the role %q is neither admin nor developer", o.As)
	}
	dir, err := home(lab, name, o.UID)
	if err != nil {
		return fmt.Errorf("home directory: %w", err)
	}
	runtimeDir := fmt.Sprintf("/run/user/%d", o.UID)
	if err := ns.Do(l.Holder, unix.CLONE_NEWNS, func() error { return makeOwned(runtimeDir, o.UID) }); err != nil {
		return err
	}
	return ns.Run(l.Holder, ns.Command{
		Argv: argv, UID: o.UID, Dir: workingDir(dir),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Started: started,
		Env: environment(os.Environ(), map[string]string{
			"HOME": dir, "KUBECONFIG": filepath.Join(dir, file), "XDG_RUNTIME_DIR": runtimeDir,
			"USER": userName(o.UID), "LOGNAME": userName(o.UID), "PATH": path(o.BinDir),
		}),
	})
}

func makeOwned(dir string, uid int) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	return os.Chown(dir, uid, uid)
}

// workingDir is ours, unless the laptop hides it.
func workingDir(home string) string {
	wd, err := os.Getwd()
	if err != nil || wd == "/run" || strings.HasPrefix(wd, "/run/") {
		return home
	}
	return wd
}

func userName(uid int) string {
	if uid == UID {
		return User
	}
	if u, err := user.LookupId(fmt.Sprint(uid)); err == nil {
		return u.Username
	}
	return fmt.Sprint(uid)
}

func path(binDir string) string {
	return binDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"
}

// environment is ours without what belongs to our session, and with what belongs to the laptop's.
func environment(ours []string, laptop map[string]string) []string {
	drop := []string{
		"XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_SESSION_ID",
		"DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK", "MAIL",
		"SUDO_USER", "SUDO_UID", "SUDO_GID", "SUDO_COMMAND", "SUDO_HOME",
		"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "ALL_PROXY", "all_proxy",
	}
	var env []string
	for _, kv := range ours {
		key, _, _ := strings.Cut(kv, "=")
		if _, replaced := laptop[key]; !replaced && !slices.Contains(drop, key) {
			env = append(env, kv)
		}
	}
	for key, value := range laptop {
		env = append(env, key+"="+value)
	}
	slices.Sort(env)
	return env
}
