// Package system makes sure that the programs of the operating system that a lab uses are there.
package system

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// need is a program that a lab uses and the Debian and Ubuntu package it is in.
type need struct{ program, pkg string }

func needs() []need {
	return []need{
		{"containerd", "containerd"},
		{"ctr", "containerd"},
		{"runc", "runc"},
		{"nft", "nftables"},
		{"iptables", "iptables"},
		{"mount", "mount"},
	}
}

func cniPlugins() []string { return []string{"ptp", "host-local", "portmap", "loopback"} }

func cniDirs() []string { return []string{"/usr/lib/cni", "/opt/cni/bin"} }

// Ensure installs what is missing, or names it in one line. It returns the directory of the CNI plugins.
func Ensure(ctx context.Context, installing func(packages []string)) (cniDir string, err error) {
	if os.Geteuid() != 0 {
		return "", errors.New("the lab makes namespaces and links: run it as root")
	}
	missing := missingPackages()
	if len(missing) > 0 {
		installing(missing)
		if err := install(ctx, missing); err != nil {
			return "", fmt.Errorf("install these packages, which could not be installed: %s: %w", strings.Join(missing, " "), err)
		}
		if missing = missingPackages(); len(missing) > 0 {
			return "", fmt.Errorf("programs are still missing after installing: %s", strings.Join(missing, " "))
		}
	}
	dir, _ := findCNI()
	return dir, nil
}

func missingPackages() []string {
	var packages []string
	for _, n := range needs() {
		if !found(n.program) {
			packages = append(packages, n.pkg)
		}
	}
	if _, ok := findCNI(); !ok {
		packages = append(packages, "containernetworking-plugins")
	}
	slices.Sort(packages)
	return slices.Compact(packages)
}

// found looks into the administrator's directories too, which sudo and others may leave out of PATH.
func found(program string) bool {
	if _, err := exec.LookPath(program); err == nil {
		return true
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if _, err := os.Stat(filepath.Join(dir, program)); err == nil {
			return true
		}
	}
	return false
}

// findCNI returns the first directory that has all plugins.
func findCNI() (string, bool) {
	for _, dir := range cniDirs() {
		if !slices.ContainsFunc(cniPlugins(), func(p string) bool {
			_, err := os.Stat(filepath.Join(dir, p))
			return err != nil
		}) {
			return dir, true
		}
	}
	return "", false
}

func install(ctx context.Context, packages []string) error {
	if !found("apt-get") {
		return errors.New("this machine has no apt-get")
	}
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-qy", "--no-install-recommends"}, packages...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", args[0], err, lastLine(out))
		}
	}
	return nil
}

func lastLine(out []byte) []byte {
	out = bytes.TrimSpace(out)
	return out[bytes.LastIndexByte(out, '\n')+1:]
}
