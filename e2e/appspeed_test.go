package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// envSpeed asks for comparisons, which tell figures and take some minutes.
const envSpeed = "DOPPEL_E2E_SPEED"

const speedService = `apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  selector: {matchLabels: {app: NAME}}
  template:
    metadata: {labels: {app: NAME}, annotations: {doppel.dev/volumes: "/kept=rw"}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: app
        image: doppel.lab/app:e2e
        imagePullPolicy: Never
        args: [serve, ":7000"]
        volumeMounts: [{name: kept, mountPath: /kept}]
      volumes: [{name: kept, persistentVolumeClaim: {claimName: kept}}]
`

// TestAppSpeed compares the volumes that doppel mounts with those that sshfs mounts over the same stream, by turns, each newly mounted.
func TestAppSpeed(t *testing.T) {
	if os.Getenv(envSpeed) != "1" {
		t.Skipf("%s=1 compares with sshfs", envSpeed)
	}
	a := newInPlace(t)
	script := `cd /var/lib/kept && mkdir -m 777 speed && cd speed && head -c 100M /dev/urandom > big && for i in 1 2 3; do head -c 25M /dev/urandom > $i; done &&
		for d in $(seq 50); do mkdir -p tree/$d && for f in $(seq 100); do echo small > tree/$d/$f; done; done`
	a.node(t, script)
	source := filepath.Join(a.dir, "source")
	for i := range 4 {
		a.c.apply(t, a.ns, []byte(strings.ReplaceAll(speedService, "NAME", service(i))))
	}
	for i := range 4 {
		a.c.available(t, a.ns, service(i))
	}
	a.l.sh(t, "head -c 100M /dev/urandom > "+source)
	// The clients are there as long as the commands: $1, $2, … are the directories.
	tasks := []struct {
		name   string
		mounts int
		line   string
	}{
		{"read 100 MiB", 1, "dd bs=1M of=/dev/null if=$1/big"},
		{"write 100 MiB", 1, "dd bs=1M if=" + source + " of=$1/new && rm $1/new"},
		{"read 3 files of 25 MiB of 4 services at once", 4, "for d in $@; do for f in 1 2 3; do dd bs=1M of=/dev/null if=$d/$f & done; done; wait"},
		{"look at 5,000 files", 1, "find $1/tree -size +1M"},
		{"read 5,000 files", 1, "grep -rL small $1/tree || :"},
	}
	ways := []struct {
		name  string
		mount func(t *testing.T, i int) (dir string, end func())
	}{{"doppel", a.mountOurs}, {"sshfs", a.mountSSHFS}}
	for i := range 4 {
		a.l.run(t, "doppel", "ingest", ingestion(i), "-w", service(i), "--mount=false")
	}
	for _, task := range tasks {
		took := map[string][]time.Duration{}
		for range 3 {
			for _, w := range ways {
				args := []string{"sh", "-c", task.line, "sh"}
				var ends []func()
				for i := range task.mounts {
					dir, end := w.mount(t, i)
					args, ends = append(args, dir+"/kept/speed"), append(ends, end)
				}
				began := time.Now()
				a.l.run(t, args...)
				took[w.name] = append(took[w.name], time.Since(began))
				for _, end := range ends {
					end()
				}
			}
		}
		median := func(name string) time.Duration {
			slices.Sort(took[name])
			return took[name][len(took[name])/2]
		}
		ours, theirs := median("doppel"), median("sshfs")
		t.Logf("%-45s doppel %8s  sshfs %8s  %.2f times faster", task.name, ours.Round(time.Millisecond), theirs.Round(time.Millisecond), float64(theirs)/float64(ours))
	}
}

func service(i int) string   { return fmt.Sprintf("service%d", i) }
func ingestion(i int) string { return fmt.Sprintf("speed%d", i) }

func (a *inPlace) mountOurs(t *testing.T, i int) (dir string, end func()) {
	t.Helper()
	name := fmt.Sprintf("ours%d", i)
	dir = filepath.Join(a.dir, name)
	a.l.run(t, "doppel", "ingest", name, "-w", service(i), "--mount", dir+":rw")
	return dir, func() { a.l.run(t, "doppel", "leave", name) }
}

func (a *inPlace) mountSSHFS(t *testing.T, i int) (dir string, end func()) {
	t.Helper()
	dir = filepath.Join(a.dir, ingestion(i))
	a.l.run(t, "mkdir", "-p", dir)
	done := make(chan result, 1)
	go func() {
		done <- a.l.try(t, "doppel", "sftp", ingestion(i), "--", "sshfs", "-f", "-o", "passive", ":/", dir)
	}()
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(a.l.try(t, "cat", "/proc/mounts").stdout, dir) {
			return errors.New("not mounted")
		}
		return nil
	})
	return dir, func() {
		a.l.run(t, "fusermount3", "-u", dir)
		<-done
	}
}
