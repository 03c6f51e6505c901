package spawn

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	serviceUnit  = RootProgram + ".service"
	serviceGroup = "doppel" // its members may connect (rootd.Group)

	// Where installing puts things, and where a package of the distribution does.
	installedUnit    = "/etc/systemd/system/" + serviceUnit
	installedProgram = "/usr/local/libexec/" + RootProgram
	enabledLink      = "/etc/systemd/system/multi-user.target.wants/" + serviceUnit
	// systemdRuns exists while systemd is the init system (sd_booted(3)).
	systemdRuns = "/run/systemd/system"

	// serviceWait is how long a service that is enabled may take to come back before the root daemon is started through sudo.
	serviceWait = 2 * time.Second
	// stepTimeout bounds each program that installing runs.
	stepTimeout = 30 * time.Second
)

var packagedUnits = []string{"/usr/lib/systemd/system/" + serviceUnit, "/lib/systemd/system/" + serviceUnit}

//go:embed doppel-rootd.service
var unitTemplate string

// Unit is the systemd unit that runs the program as a service.
func Unit(program string) string { return strings.ReplaceAll(unitTemplate, "@PROGRAM@", program) }

// Service is doppel-rootd as a service of systemd. The zero value is this machine's.
type Service struct {
	root string // the machine's root directory; tests have another
}

// machine is what installing and uninstalling depend on.
type machine struct {
	Systemd  bool
	Packaged bool // a package brought unit and program
	Unit     bool // we installed the unit before
	Group    bool // the group exists
	User     string
	Member   bool   // the user is in the group
	Program  string // doppel-rootd as it lies beside doppel
}

// Step is one change of the machine.
type Step struct {
	Say  string   // what it does, for people
	Run  []string // a program
	Path string   // or a file: written with Text, or else a copy of From, or else removed
	Text string
	From string
}

// removeUnit removes the unit that installing has written. As long as it is in /etc, systemd takes it and not the one that a package brought.
func removeUnit() []Step {
	return []Step{
		{Say: "remove " + installedUnit, Path: installedUnit},
		{Say: "have systemd forget it", Run: []string{"systemctl", "daemon-reload"}},
	}
}

func removeProgram() Step { return Step{Say: "remove " + installedProgram, Path: installedProgram} }

// installSteps makes the service of doppel-rootd. The program is copied to where only root can change it: what a user may replace must not
// run as root. What was installed before a package came makes way for that.
func installSteps(m machine) []Step {
	var s []Step
	if !m.Group {
		s = append(s, Step{Say: "create the group " + serviceGroup, Run: []string{"groupadd", "--system", serviceGroup}})
	}
	if m.User != "" && !m.Member {
		s = append(s, Step{Say: "add " + m.User + " to the group " + serviceGroup, Run: []string{"usermod", "--append", "--groups", serviceGroup, m.User}})
	}
	if m.Packaged && m.Unit {
		s = append(s, Step{Say: "disable the service that was installed", Run: []string{"systemctl", "disable", serviceUnit}}) // its link leads to that unit
		s = append(append(s, removeUnit()...), removeProgram())
	}
	if !m.Packaged {
		s = append(s,
			Step{Say: "copy " + m.Program + " to " + installedProgram, Path: installedProgram, From: m.Program},
			Step{Say: "write " + installedUnit, Path: installedUnit, Text: Unit(installedProgram)},
			Step{Say: "have systemd read it", Run: []string{"systemctl", "daemon-reload"}})
	}
	return append(s,
		Step{Say: "start the service at every boot", Run: []string{"systemctl", "enable", serviceUnit}},
		Step{Say: "start the service", Run: []string{"systemctl", "restart", serviceUnit}})
}

// uninstallSteps undoes installSteps. What a package brought stays, disabled: removing it is the package manager's.
func uninstallSteps(m machine) []Step {
	var s []Step
	if m.Unit || m.Packaged {
		s = append(s, Step{Say: "stop the service", Run: []string{"systemctl", "disable", "--now", serviceUnit}})
	}
	if m.Unit {
		s = append(s, removeUnit()...)
	}
	if m.Unit || !m.Packaged {
		s = append(s, removeProgram())
	}
	if m.Group && !m.Packaged {
		s = append(s, Step{Say: "remove the group " + serviceGroup, Run: []string{"groupdel", serviceGroup}})
	}
	return s
}

// Install makes doppel-rootd a service and lets a user use it; with dry nothing is changed. It returns what was done.
func (s Service) Install(ctx context.Context, name string, dry bool) ([]Step, error) {
	m, err := s.look(ctx, name)
	if err != nil {
		return nil, err
	}
	if m.Program, err = Find(RootProgram); err != nil {
		return nil, err
	}
	return s.apply(ctx, m, installSteps(m), dry)
}

// Uninstall undoes Install.
func (s Service) Uninstall(ctx context.Context, dry bool) ([]Step, error) {
	m, err := s.look(ctx, "")
	if err != nil {
		return nil, err
	}
	return s.apply(ctx, m, uninstallSteps(m), dry)
}

func (s Service) look(ctx context.Context, name string) (machine, error) {
	m := machine{Systemd: s.exists(systemdRuns), Unit: s.exists(installedUnit), Packaged: slices.ContainsFunc(packagedUnits, s.exists)}
	_, err := user.LookupGroup(serviceGroup)
	m.Group = err == nil
	if name == "" || name == "root" {
		return m, nil
	}
	u, err := lookup(ctx, name)
	if err != nil {
		return m, uerr.Wrap(err, uerr.Usage, "name a user of this machine with --user", "who is to use the service")
	}
	m.User, m.Member = u.Username, member(u)
	return m, nil
}

// lookup finds a user. Without cgo the library knows those of /etc/passwd only, and getent(1) those of directories (SSSD, LDAP, systemd-homed) too.
func lookup(ctx context.Context, name string) (*user.User, error) {
	u, err := user.Lookup(name)
	if err == nil || strings.HasPrefix(name, "-") { // would be an option
		return u, err
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	out, getentErr := exec.CommandContext(ctx, "getent", "passwd", name).Output()
	if getentErr != nil { // there is none, or no getent
		return nil, err
	}
	line, _, _ := strings.Cut(string(out), "\n")
	f := strings.Split(line, ":") // passwd(5)
	if len(f) < 6 || f[0] == "" {
		return nil, err
	}
	return &user.User{Username: f[0], Uid: f[2], Gid: f[3], Name: f[4], HomeDir: f[5]}, nil
}

// member says whether the system's lists have the user in the service's group; a login from before does not know yet.
func member(u *user.User) bool {
	g, err := user.LookupGroup(serviceGroup)
	if err != nil {
		return false
	}
	ids, err := u.GroupIds()
	return err == nil && slices.Contains(ids, g.Gid)
}

func (s Service) exists(path string) bool {
	_, err := os.Stat(s.path(path))
	return err == nil
}

func (s Service) path(p string) string { return filepath.Join(s.root, p) }

func (s Service) apply(ctx context.Context, m machine, steps []Step, dry bool) ([]Step, error) {
	if !m.Systemd {
		return nil, uerr.New(uerr.Usage, "have your init system run, as root: "+RootProgram+" --service; members of the group "+serviceGroup+" may then connect",
			"systemd does not run on this machine, and other init systems are not set up by this command")
	}
	if dry {
		return steps, nil
	}
	for i, st := range steps {
		if err := s.do(ctx, st); err != nil {
			return steps[:i], uerr.Wrap(err, uerr.Internal, "mend that and run the command again", "%s", st.Say)
		}
	}
	return steps, nil
}

func (s Service) do(ctx context.Context, st Step) error {
	if st.Run != nil {
		ctx, cancel := context.WithTimeout(ctx, stepTimeout)
		defer cancel()
		if out, err := exec.CommandContext(ctx, st.Run[0], st.Run[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(st.Run, " "), err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	path := s.path(st.Path)
	switch {
	case st.Text != "":
		return replaceFile(path, []byte(st.Text), 0o644)
	case st.From != "":
		b, err := os.ReadFile(st.From)
		if err != nil {
			return err
		}
		return replaceFile(path, b, 0o755)
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// replaceFile writes a file in one step, also over a program that runs.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".doppel-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// ServiceStatus is what there is of the service.
type ServiceStatus struct {
	Systemd bool   `json:"systemd"`           // systemd runs here
	Unit    string `json:"unit,omitempty"`    // the unit's file
	Enabled bool   `json:"enabled"`           // it is started at boot
	Group   bool   `json:"group"`             // the group exists
	Member  bool   `json:"member"`            // the user is in it, or root
	Login   bool   `json:"login"`             // and this login knows that
	Running string `json:"running,omitempty"` // the doppel-rootd that answers
}

// Status looks at the service without changing anything.
func (s Service) Status(ctx context.Context) (ServiceStatus, error) {
	st := ServiceStatus{Systemd: s.exists(systemdRuns), Enabled: s.exists(enabledLink), Login: inGroup()}
	for _, p := range append([]string{installedUnit}, packagedUnits...) {
		if st.Unit == "" && s.exists(p) {
			st.Unit = p
		}
	}
	_, err := user.LookupGroup(serviceGroup)
	st.Group = err == nil
	u, err := user.Current()
	if err != nil {
		return st, err
	}
	st.Member = u.Uid == "0" || member(u)
	ctx, cancel := context.WithTimeout(ctx, serviceWait)
	defer cancel()
	c, err := rootapi.Dial(ctx, rootapi.DefaultSocket, rootapi.Options{})
	switch {
	case errors.Is(err, rootapi.ErrNotRunning):
		return st, nil
	case err != nil:
		st.Running = "not for you: " + err.Error()
		return st, nil
	}
	defer c.Close()
	v, err := c.Version(ctx)
	if err != nil {
		return st, err
	}
	st.Running = fmt.Sprintf("%s, pid %d", v.Program, v.PID)
	return st, nil
}

// RootIsService says whether the root daemon that answers is a service, or the one that would if none does.
func RootIsService(ctx context.Context) bool {
	v, err := rootapi.Running(ctx, RootSocket())
	if err == nil {
		return v.Service
	}
	return os.Getenv(EnvRootSocket) == "" && (Service{}).exists(enabledLink)
}

// expected says whether a service that is not there now should come back by itself, and let us in.
func (s Service) expected() bool { return s.exists(systemdRuns) && s.exists(enabledLink) && inGroup() }

// inGroup says whether this process may use the service's socket.
func inGroup() bool {
	if os.Geteuid() == 0 {
		return true
	}
	g, err := user.LookupGroup(serviceGroup)
	if err != nil {
		return false
	}
	mine, err := os.Getgroups()
	return err == nil && slices.ContainsFunc(mine, func(id int) bool { return fmt.Sprint(id) == g.Gid })
}
