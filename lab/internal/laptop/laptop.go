// Package laptop makes machines that stand where a developer's laptop stands: outside the cluster, with the address of
// the API server, a resolver and a home directory.
package laptop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/state"
	"github.com/doppel-dev/doppel/lab/internal/wan"
)

// User is the unprivileged user of every laptop; it may use sudo without a password.
const (
	User = "dev"
	UID  = 1000
)

// Add makes a laptop and joins it to the lab. The caller holds the lab's lock.
func Add(lab *state.Lab, name string) error {
	if err := plan.CheckName(name); err != nil {
		return err
	}
	if l, ok := lab.Laptops[name]; ok {
		if ns.Alive(l.Holder) {
			return fmt.Errorf("laptop %q exists already", name)
		}
		if err := Remove(lab, name); err != nil {
			return err
		}
	}
	index, err := freeIndex(lab)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(lab.Path("laptops", name), 0o755); err != nil {
		return err
	}
	spec, err := spec(lab, name, plan.LaptopNet(index))
	if err != nil {
		return err
	}
	holder, err := ns.Start(spec, lab.Path("log", "laptop-"+name+".log"), func(p state.Process) error {
		lab.Laptops[name] = state.Laptop{Index: index, Holder: p}
		return lab.Save()
	})
	if err == nil {
		err = wan.JoinLaptop(lab.Wan, holder, plan.LaptopNet(index))
	}
	if err == nil {
		_, err = home(lab, name, 0)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("laptop %s: %w", name, err), Remove(lab, name))
	}
	return nil
}

// Remove ends the laptop, everything that runs on it, and removes its files. The caller holds the lab's lock.
func Remove(lab *state.Lab, name string) error {
	l, ok := lab.Laptops[name]
	if !ok {
		return fmt.Errorf("there is no laptop %q", name)
	}
	if err := ns.Kill(l.Holder, 20*time.Second); err != nil {
		return err
	}
	if err := errors.Join(
		wan.RemoveLaptop(lab.Wan, plan.LaptopNet(l.Index)),
		os.RemoveAll(lab.Path("laptops", name)),
		os.RemoveAll(lab.Path("log", "laptop-"+name+".log")),
	); err != nil {
		return err
	}
	delete(lab.Laptops, name)
	return lab.Save()
}

// Get returns a laptop that runs.
func Get(lab *state.Lab, name string) (state.Laptop, error) {
	l, ok := lab.Laptops[name]
	if !ok {
		return l, fmt.Errorf("there is no laptop %q: make it with: lab laptop add %s", name, name)
	}
	if !ns.Alive(l.Holder) {
		return l, fmt.Errorf("laptop %q is gone: make it again with: lab laptop add %s", name, name)
	}
	return l, nil
}

func freeIndex(lab *state.Lab) (int, error) {
	used := map[int]bool{}
	for _, l := range lab.Laptops {
		used[l.Index] = true
	}
	for i := 1; i <= plan.MaxLaptops; i++ {
		if !used[i] {
			return i, nil
		}
	}
	return 0, errors.New("no subnet is left for another laptop")
}

// spec is what a laptop's holder sets up: an /etc of its own, in which resolv.conf is a plain file that programs may
// replace, and an empty /run.
func spec(lab *state.Lab, name string, net plan.Laptop) (ns.Spec, error) {
	users, err := withUser("/etc/passwd", fmt.Sprintf("%s:*:%d:%d:%s:%s:/bin/sh", User, UID, UID, User, homeDir(lab, name, UID)))
	if err != nil {
		return ns.Spec{}, err
	}
	groups, err := withUser("/etc/group", fmt.Sprintf("%s:*:%d:", User, UID))
	if err != nil {
		return ns.Spec{}, err
	}
	hosts := fmt.Sprintf("127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost\n", name)
	return ns.Spec{
		Hostname: name,
		Hide:     []string{"/run"},
		Overlay:  []string{"/etc"},
		Remove:   []string{"/etc/resolv.conf"},
		Files: []ns.File{
			{Path: "/etc/resolv.conf", Content: "nameserver " + net.Gateway.String() + "\n", Mode: 0o644},
			{Path: "/etc/hosts", Content: hosts, Mode: 0o644},
			{Path: "/etc/passwd", Content: users, Mode: 0o644},
			{Path: "/etc/group", Content: groups, Mode: 0o644},
			{Path: "/etc/sudoers.d", Dir: true, Mode: 0o750},
			{Path: "/etc/sudoers.d/" + User, Content: User + " ALL=(ALL:ALL) NOPASSWD: ALL\n", Mode: 0o440},
			{Path: "/run/lock", Dir: true, Mode: 0o1777},
			{Path: "/run/user", Dir: true, Mode: 0o755},
			{Path: "/run/user/0", Dir: true, Mode: 0o700},
			{Path: fmt.Sprintf("/run/user/%d", UID), Dir: true, Mode: 0o700, UID: UID},
		},
	}, nil
}

// withUser returns the machine's list of users or groups with the line added, in the place of another of the same id.
func withUser(file, line string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var content strings.Builder
	for l := range strings.Lines(string(b)) {
		f := strings.Split(l, ":")
		if len(f) < 3 || (f[2] != strconv.Itoa(UID) && f[0] != User) {
			content.WriteString(strings.TrimRight(l, "\n") + "\n")
		}
	}
	content.WriteString(line + "\n")
	return content.String(), nil
}

func homeDir(lab *state.Lab, name string, uid int) string {
	return lab.Path("laptops", name, "home", fmt.Sprint(uid))
}

// kubeconfigs are the files of a home directory by role; the administrator's is where programs look by themselves.
func kubeconfigs() map[string]string {
	return map[string]string{"admin": ".kube/config", "developer": ".kube/developer"}
}

// home makes sure that the user has a home directory on the laptop, with kubeconfigs.
func home(lab *state.Lab, name string, uid int) (string, error) {
	dir := homeDir(lab, name, uid)
	kube := filepath.Join(dir, ".kube")
	if _, err := os.Stat(kube); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	// Made beside and renamed, so that a second command at the same time finds all or nothing.
	tmp, err := os.MkdirTemp(dir, ".kube-*")
	if err != nil {
		return "", err
	}
	for role, file := range kubeconfigs() {
		b, err := os.ReadFile(lab.Path("pki", role+".conf"))
		if err != nil {
			return "", err
		}
		path := filepath.Join(tmp, filepath.Base(file))
		if err := errors.Join(os.WriteFile(path, b, 0o600), os.Chown(path, uid, uid)); err != nil {
			return "", err
		}
	}
	if err := errors.Join(os.Chown(tmp, uid, uid), os.Chown(dir, uid, uid)); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, kube); err != nil {
		// The other command was faster.
		return dir, os.RemoveAll(tmp)
	}
	return dir, nil
}
