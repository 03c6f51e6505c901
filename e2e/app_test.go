package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// password is in a Secret, of which nothing may be told.
const password = "open-sesame's \"twin\"\nand $(FIRST) \\ line"

// inPlace is the world of TestApp: a laptop with a process in the place of an app that has all kinds of variables and volumes.
type inPlace struct {
	c     *cluster
	ns    string
	l     *laptop
	bin   string // the app's program
	dir   string // files of the test, which the laptop sees too
	point string // where the volumes are
}

// TestApp: what an app has besides its traffic, a process of a laptop in its place has too: environment, files, its own identity.
func TestApp(t *testing.T) {
	a := newInPlace(t)
	t.Run("Refused", a.refused)
	t.Run("Environment", a.environment)
	t.Run("Files", a.files)
	t.Run("Updates", a.updates)
	t.Run("NewPod", a.newPod)
	t.Run("Command", a.command)
	t.Run("Ingest", a.ingest)
	t.Run("Replace", a.replace)
	t.Run("SSHFS", a.sshfs)
	t.Run("Copy", a.copies)
	t.Run("Bad", a.bad)
	t.Run("Secrets", a.secrets)
	t.Run("Ends", a.ends)
}

func newInPlace(t *testing.T) *inPlace {
	c := theCluster(t)
	a := &inPlace{c: c, ns: c.namespace(t, "inplace"), dir: t.TempDir()}
	for d := a.dir; d != os.TempDir(); d = filepath.Dir(d) { // for the laptop's ordinary user
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	a.bin = filepath.Join(a.dir, "app")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", a.bin, "./e2e/app")
	build.Dir, build.Env = c.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build app: %v\n%s", err, out)
	}
	archive := filepath.Join(a.dir, "app.tar")
	for _, args := range [][]string{
		{"image", "build", "--binary", a.bin, "--binary", a.bin + ":/bin/cat", "--env", "OF_IMAGE=of the image", "--env", "PATH=/bin", "--name", "doppel.lab/app:e2e", "--user", "65532", "-o", archive},
		{"load", archive},
		{"node", "exec", "--", "mkdir", "-p", "-m", "777", "/var/lib/kept"},
	} {
		if out, err := c.lab(args...); err != nil {
			t.Fatalf("lab %v: %v\n%s", args, err, out)
		}
	}
	a.objects(t)
	c.available(t, a.ns, "web")
	a.l = newLaptop(t, "inplace")
	a.l.withManager(t)
	a.l.run(t, "doppel", "connect", "-n", a.ns)
	a.l.run(t, "doppel", "loglevel", "debug")
	return a
}

// objects creates the app and what it refers to.
func (a *inPlace) objects(t *testing.T) {
	t.Helper()
	core, meta, create := a.c.core.CoreV1(), metav1.ObjectMeta{}, metav1.CreateOptions{}
	named := func(name string) metav1.ObjectMeta { meta.Name = name; return meta }
	none, size := "", corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	modes := []corev1.PersistentVolumeAccessMode{corev1.ReadWriteMany}
	ok(core.ServiceAccounts(a.ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: named("app")}, create))(t)
	ok(core.ConfigMaps(a.ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: named("conf"), Data: map[string]string{"greeting": "hello", "color": "blue", "dotted.name": "x"}}, create))(t)
	ok(core.Secrets(a.ns).Create(t.Context(), &corev1.Secret{ObjectMeta: named("secret"), StringData: map[string]string{"password": password}}, create))(t)
	ok(core.PersistentVolumes().Create(t.Context(), &corev1.PersistentVolume{ObjectMeta: named("kept"), Spec: corev1.PersistentVolumeSpec{
		Capacity: size, AccessModes: modes, PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/lib/kept"}},
		PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain, ClaimRef: &corev1.ObjectReference{Namespace: a.ns, Name: "kept"},
	}}, create))(t)
	t.Cleanup(func() { _ = core.PersistentVolumes().Delete(context.Background(), "kept", metav1.DeleteOptions{}) })
	ok(core.PersistentVolumeClaims(a.ns).Create(t.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: named("kept"), Spec: corev1.PersistentVolumeClaimSpec{
		AccessModes: modes, StorageClassName: &none, VolumeName: "kept", Resources: corev1.VolumeResourceRequirements{Requests: size},
	}}, create))(t)
	ok(core.Services(a.ns).Create(t.Context(), &corev1.Service{ObjectMeta: named("web"), Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}, {Name: "help", Port: 81, TargetPort: intstr.FromString("help")}},
	}}, create))(t)
	b, err := os.ReadFile("testdata/app.yaml")
	if err != nil {
		t.Fatal(err)
	}
	a.c.apply(t, a.ns, b)
}

// pod is the pod of the app that is ready and stays.
func (a *inPlace) pod(t *testing.T) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, time.Minute, func() error {
		list, err := a.c.core.CoreV1().Pods(a.ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
		if len(pods) != 1 || !slices.ContainsFunc(pods[0].Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue }) {
			return fmt.Errorf("%d pods, or not ready", len(pods))
		}
		pod = &pods[0]
		return nil
	})
	return pod
}

// ask asks the app itself.
func (a *inPlace) ask(t *testing.T, path string) string {
	t.Helper()
	out := filepath.Join(a.dir, "answer")
	a.l.run(t, "curl", "-sf", "-m", "20", "-o", out, "http://"+a.pod(t).Status.PodIP+":7001"+path)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// same compares what two processes have, but for what differs by place.
func (a *inPlace) same(t *testing.T, what string, got, want map[string]string, but ...string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if g, ok := got[name]; !slices.Contains(but, name) && (!ok || g != want[name]) {
			t.Errorf("%s: %s is %q (%v), the app has %q", what, name, g, ok, want[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[name]; !ok && !slices.Contains(but, name) {
			t.Errorf("%s: %s=%q, which the app does not have", what, name, got[name])
		}
	}
}

// refused is what the cluster does not allow.
func (a *inPlace) refused(t *testing.T) {
	r := a.l.try(t, "doppel", "intercept", "help", "-w", "web", "-p", "3001:help", "--mount=true:rw")
	if r.code == 0 {
		t.Error("what is read-only was mounted to be written")
	}
	want(t, r.stderr, "all volumes of container helper are read-only for laptops: /etc/app, /var/run/secrets/kubernetes.io/serviceaccount", `hint: ask for the annotation doppel.dev/volumes: "PATH=rw" on the pod template, or for the chart's value agent.volumes`)
	want(t, a.l.run(t, "doppel", "list", "-i"), "No intercepts")
	if r := a.l.try(t, "doppel", "intercept", "web", "-p", "3000:http", "--mount", "/etc"); r.code == 0 || !strings.Contains(r.stderr, "/etc is not empty") {
		t.Errorf("a mount point that is in use: %v", r)
	}
}

// environment is the app's own, however it is handed on.
func (a *inPlace) environment(t *testing.T) {
	j, f := filepath.Join(a.dir, "env.json"), filepath.Join(a.dir, "env.sh")
	out := a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--env-json", j, "--env-file", f, "--env-syntax", "sh:export", "--mount=true:rw")
	m := regexp.MustCompile(`(?m)^   Volume Mount Point: (/\S+)$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no mount point:\n%s", out)
	}
	a.point = m[1]
	var app map[string]string
	if err := json.Unmarshal([]byte(a.ask(t, "/environ")), &app); err != nil {
		t.Fatal(err)
	}
	if app["PASSWORD"] != password || app["WITH_PASSWORD"] != "user:"+password+"@"+app["POD"] || !strings.HasSuffix(app["REFERENCES"], " 443 $(NOBODY) $(FIRST) $ $(POD)") || app["OF_IMAGE"] == "" {
		t.Fatalf("the app itself has %q", app)
	}

	ours := []string{"DOPPEL_CONTAINER", "DOPPEL_ROOT", "DOPPEL_MOUNTS"}
	local := []string{"PATH", "HOME"}
	var got map[string]string
	b, err := os.ReadFile(j)
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	if err != nil {
		t.Fatal(err)
	}
	a.same(t, "--env-json", got, app, append(ours, local...)...)
	for name, want := range map[string]string{
		"DOPPEL_CONTAINER": "app", "DOPPEL_ROOT": a.point, "PATH": "",
		"DOPPEL_MOUNTS": "/etc/app:/opt/shop/greeting.txt:/etc/shop-secret:/data:/data/kept:/small:/scratch:/var/run/secrets/kubernetes.io/serviceaccount",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if fi, err := os.Stat(j); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}

	// A shell that has read the file gives it to what it starts. A name that is none for a shell is not there.
	b, err = exec.Command("env", "-i", "/bin/sh", "-c", ". "+f+" && exec "+a.bin+" environ").Output()
	clear(got)
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := got["CONF_dotted.name"]; ok {
		t.Error("a shell has taken a dotted name")
	}
	a.same(t, "--env-file", got, app, append(append(ours, local...), "CONF_dotted.name", "PWD")...)
}

// files are the same bytes on both sides, and nobody changes what is not theirs.
func (a *inPlace) files(t *testing.T) {
	big := filepath.Join(a.dir, "big")
	noise := make([]byte, 8<<20+5)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	if err := os.WriteFile(big, noise, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"/data", "/data/kept"} {
		a.l.run(t, "cp", big, a.point+d+"/from-laptop")
		if got := a.ask(t, "/file"+d+"/from-laptop"); got != string(noise) {
			t.Errorf("%s: the app reads %d bytes, others", d, len(got))
		}
		a.l.run(t, "curl", "-sf", "-m", "20", "-T", big, "http://"+a.pod(t).Status.PodIP+":7001/file"+d+"/from-app")
		eventually(t, 3*time.Second, func() error { // a name that was not there a second ago
			if r := a.l.try(t, "cmp", big, a.point+d+"/from-app"); r.code != 0 {
				return errors.New(r.String())
			}
			return nil
		})
	}
	for name, text := range map[string]string{"/etc/app/greeting": "hello", "/opt/shop/greeting.txt": "hello", "/etc/shop-secret/password": password} {
		if got := a.l.run(t, "cat", a.point+name); got != text {
			t.Errorf("%s: %q", name, got)
		}
	}
	for name, why := range map[string]string{
		"/etc/app/new": "Read-only file system", "/scratch/new": "Read-only file system", "/opt/shop/greeting.txt": "Read-only file system",
		"/var/run/secrets/kubernetes.io/serviceaccount/new": "Read-only file system", "/new": "Read-only file system",
	} {
		if r := a.l.try(t, "sh", "-c", "LC_ALL=C cp "+big+" "+a.point+name); r.code == 0 || !strings.Contains(r.stderr, why) {
			t.Errorf("%s: %v", name, r)
		}
	}
	if r := a.l.try(t, "ls", a.point+"/etc/hidden"); r.code == 0 {
		t.Errorf("what is hidden is there: %v", r)
	}
	token := a.l.run(t, "cat", a.point+"/var/run/secrets/kubernetes.io/serviceaccount/token")
	if got := a.ask(t, "/file/var/run/secrets/kubernetes.io/serviceaccount/token"); got != token || token == "" {
		t.Error("the token is another one than the app's")
	}
}

// updates are seen: those of a ConfigMap, and a token that the kubelet has renewed.
func (a *inPlace) updates(t *testing.T) {
	patch := func(path types.PatchType, body string) {
		t.Helper()
		ok(a.c.core.CoreV1().ConfigMaps(a.ns).Patch(t.Context(), "conf", path, []byte(body), metav1.PatchOptions{}))(t)
		// A change of the pod has the kubelet look at once.
		ok(a.c.core.CoreV1().Pods(a.ns).Patch(t.Context(), a.pod(t).Name, path, []byte(`{"metadata":{"annotations":{"test":"look"}}}`), metav1.PatchOptions{}))(t)
	}
	patch(types.MergePatchType, `{"data":{"greeting":"servus"}}`) // of another length
	eventually(t, 30*time.Second, func() error {
		if got := a.l.run(t, "cat", a.point+"/etc/app/greeting"); got != "servus" {
			return errors.New(got)
		}
		return nil
	})
	// The kubelet renews a token after most of its hour; this puts another one there in the same way, by another ..data.
	script := `cd /var/lib/kubelet/pods/` + string(a.pod(t).UID) + `/volumes/kubernetes.io~projected/kube-api-access-* && cp -a "$(readlink ..data)" ..renewed && printf renewed > ..renewed/token && ln -s ..renewed ..data_tmp && mv -T ..data_tmp ..data`
	a.node(t, script)
	eventually(t, 3*time.Second, func() error {
		if got := a.l.run(t, "cat", a.point+"/var/run/secrets/kubernetes.io/serviceaccount/token"); got != "renewed" {
			return errors.New("not the new token")
		}
		return nil
	})
}

// newPod takes the place of the old one while a program has files open.
func (a *inPlace) newPod(t *testing.T) {
	file, sync := a.point+"/data/kept/lines", filepath.Join(a.dir, "go")
	if err := syscall.Mkfifo(sync, 0o600); err != nil {
		t.Fatal(err)
	}
	a.l.sh(t, "printf 'one\ntwo\n' > "+file)
	done := make(chan result, 1)
	go func() {
		done <- a.l.try(t, "sh", "-c", "exec 3<"+file+" 4>>"+file+" && read line <&3 && echo $line && echo three >&4 && read now <"+sync+" && echo four >&4 && cat <&3")
	}()
	eventually(t, 5*time.Second, func() error {
		if got := a.l.run(t, "cat", file); !strings.HasSuffix(got, "three\n") {
			return errors.New(got)
		}
		return nil
	})
	old := a.pod(t).Name
	if err := a.c.core.CoreV1().Pods(a.ns).Delete(t.Context(), old, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// Nothing fails meanwhile: whoever asks waits.
	for began := time.Now(); ; {
		if got := a.l.run(t, "cat", a.point+"/etc/app/greeting"); got != "servus" {
			t.Fatalf("%q", got)
		}
		if p, err := a.c.core.CoreV1().Pods(a.ns).Get(t.Context(), old, metav1.GetOptions{}); err != nil {
			break
		} else if time.Since(began) > 30*time.Second {
			t.Fatalf("pod %s does not go: %+v", old, p.Status)
		}
	}
	if a.pod(t).Name == old {
		t.Fatal("the pod is still the old one")
	}
	if err := os.WriteFile(sync, []byte("now\n"), 0); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-done:
		if r.code != 0 || r.stdout != "one\ntwo\nthree\nfour\n" {
			t.Errorf("%v", r)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the program with open files hangs")
	}
	if got := a.ask(t, "/file/data/kept/lines"); got != "one\ntwo\nthree\nfour\n" {
		t.Errorf("the app reads %q", got)
	}
	if r := a.l.try(t, "ls", a.point+"/data"); r.code != 0 || r.stdout != "kept\nof-"+a.pod(t).Name+"\n" {
		t.Errorf("a new pod's emptyDir is empty: %v", r)
	}
}

// command runs in the app's place: with what the app finds without asking.
func (a *inPlace) command(t *testing.T) {
	a.l.run(t, "doppel", "leave", "web")
	r := a.l.try(t, "doppel", "intercept", "web", "-p", "3000:http", "--", "sh", "-c", `echo "$CONF_greeting $HOSTNAME $PWD"; cat /opt/shop/greeting.txt; cat $DOPPEL_ROOT/etc/app/greeting; exit 7`)
	wd, _ := os.Getwd()
	if pod := a.pod(t); r.code != 7 || !strings.HasSuffix(r.stdout, "servus "+pod.Name+" "+wd+"\nservusservus") {
		t.Errorf("%v", r)
	}
	want(t, a.l.run(t, "doppel", "list", "-i"), "No intercepts")
	if r := a.l.try(t, "doppel", "intercept", "web", "-p", "3000:http", "--", "no-such-program"); r.code == 0 || !strings.Contains(r.stderr, "no-such-program") {
		t.Errorf("%v", r)
	}
	want(t, a.l.run(t, "doppel", "list", "-i"), "No intercepts")

	user := "system:serviceaccount:" + a.ns + ":app"
	if r := a.l.try(t, "doppel", "intercept", "web", "-p", "3000:http", "--", a.bin, "whoami"); r.code != 0 || !strings.HasSuffix(r.stdout, "\n"+user+"\n") {
		t.Errorf("as root: %v", r)
	}
	if r := a.l.try(t, "sh", "-c", "ls -d /var/run/secrets /opt/shop /data"); r.stdout != "" {
		t.Errorf("the laptop itself was changed: %v", r)
	}

	// A signal is the command's to deal with.
	ready := filepath.Join(a.dir, "ready")
	if err := syscall.Mkfifo(ready, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := a.l.command(t.Context(), "doppel", "intercept", "web", "-p", "3000:http", "--", "sh", "-c", `trap 'echo ended; exit 9' TERM; echo > `+ready+`; while :; do sleep 0.1; done`)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(ready); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != 9 || !strings.HasSuffix(out.String(), "ended\n") {
		t.Errorf("exit code %d\n%s", cmd.ProcessState.ExitCode(), out.String())
	}
	want(t, a.l.run(t, "doppel", "list", "-i"), "No intercepts")

	// An ordinary user has the same, without a privilege.
	a.l.run(t, "doppel", "quit", "-s")
	dev := a.l.user("1000")
	a.l.sh(t, "mknod -m 0666 /run/fuse c 10 229; mount --bind /run/fuse /dev/fuse") // as udev makes it; here it is the machine's own
	dev.run(t, "doppel", "connect", "-n", a.ns)
	if r := dev.try(t, "doppel", "intercept", "web", "-p", "3000:http", "--", "sh", "-c", a.bin+" whoami; id -u; grep CapEff /proc/self/status"); r.code != 0 || !strings.HasSuffix(r.stdout, "\n"+user+"\n1000\nCapEff:\t0000000000000000\n") {
		t.Errorf("as an ordinary user: %v", r)
	}
	dev.run(t, "doppel", "quit", "-s")
	a.l.run(t, "doppel", "connect", "-n", a.ns)
}

// ingest has what an intercept has, beside anybody's intercept and where there is no port.
func (a *inPlace) ingest(t *testing.T) {
	a.c.workload(t, a.ns, taken{name: "worker", kind: "Deployment", change: func(o any) {
		spec := &o.(*appsv1.Deployment).Spec.Template.Spec
		spec.Containers[0].Image, spec.Containers[0].Args = "doppel.lab/app:e2e", []string{"serve", ":7001"}
		beside := *spec.Containers[0].DeepCopy()
		beside.Name, beside.Args, beside.Env = "beside", []string{"serve", ":7002"}, []corev1.EnvVar{{Name: "WHO", Value: "beside"}}
		spec.Containers = append(spec.Containers, beside)
	}})
	r := a.l.try(t, "doppel", "ingest", "worker")
	if r.code == 0 || !strings.Contains(r.stderr, "Deployment worker has several containers: app, beside") || !strings.Contains(r.stderr, "--container") {
		t.Errorf("several containers: %v", r)
	}
	out := a.l.run(t, "doppel", "ingest", "worker", "--container=beside", "--", "sh", "-c", `echo "$WHO $DOPPEL_CONTAINER"; ls $DOPPEL_ROOT/var/run/secrets/kubernetes.io/serviceaccount`)
	want(t, out, "Ingesting      : environment and files of container beside", "\nbeside beside\nca.crt\nnamespace\ntoken\n")
	pods := ok(a.c.core.CoreV1().Pods(a.ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=worker"}))(t)
	for _, p := range pods.Items {
		if c := p.Spec.Containers; p.DeletionTimestamp == nil && (len(c) != 3 || len(c[2].Ports) != 0) {
			t.Errorf("the pod has %+v", c)
		}
	}

	// Another container of the pods needs another agent; an intercept is in nobody's way.
	a.l.run(t, "doppel", "ingest", "worker", "--container=app")
	a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http")
	out = a.l.run(t, "doppel", "ingest", "two", "-w", "web", "--container=app", "--mount=false", "--env-json", "/dev/stdout")
	want(t, out, `"CONF_greeting": "servus"`)
	want(t, a.l.run(t, "doppel", "list"), "worker: ingested", "web   : intercepted")
	want(t, a.l.run(t, "doppel", "status"), "worker: ACTIVE, environment and files of container app")
	for _, name := range []string{"worker", "two", "web"} {
		a.l.run(t, "doppel", "leave", name)
	}
}

// replace gives a process what the container had that does not run meanwhile.
func (a *inPlace) replace(t *testing.T) {
	r := a.l.try(t, "doppel", "replace", "helper", "-w", "web", "-p", "3001:help", "--container=helper", "--", "sh", "-c", `echo "$WHO $DOPPEL_CONTAINER"; cat $DOPPEL_ROOT/etc/app/greeting; exit 7`)
	want(t, r.stderr, "warning: without the variables of the image: nothing of it runs while container helper is replaced")
	want(t, r.stdout, "Replacing      : container helper", "The app does not run until the command ends.")
	if r.code != 7 || !strings.HasSuffix(r.stdout, "\nhelper helper\nservus") {
		t.Errorf("%v", r)
	}
	for _, c := range a.pod(t).Spec.Containers {
		if c.Name == "helper" && c.Image != "doppel.lab/app:e2e" {
			t.Errorf("the container did not come back: %+v", c)
		}
	}
}

// sshfs, a program of others, has the files by the same protocol.
func (a *inPlace) sshfs(t *testing.T) {
	a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--mount=false")
	point := filepath.Join(a.dir, "sshfs")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	mounted := func() string { return a.l.try(t, "grep", point, "/proc/mounts").stdout }
	done := make(chan result, 1)
	mount := func() {
		t.Helper()
		go func() {
			done <- a.l.try(t, "doppel", "sftp", "web", "--", "sshfs", "-f", "-o", "passive", ":/", point)
		}()
		eventually(t, 10*time.Second, func() error {
			if mounted() == "" {
				return errors.New("not mounted")
			}
			return nil
		})
	}
	ended := func(how string) {
		t.Helper()
		select {
		case r := <-done:
			t.Logf("after %s: %v", how, r)
		case <-time.After(10 * time.Second):
			t.Fatalf("after %s sshfs hangs", how)
		}
		if m := mounted(); m != "" {
			t.Errorf("after %s: %s", how, m)
		}
	}
	mount()
	big := filepath.Join(a.dir, "big") // of files
	a.l.run(t, "cp", big, point+"/data/from-sshfs")
	a.l.run(t, "cmp", big, point+"/data/from-sshfs")
	want(t, a.l.run(t, "stat", "-c", "%a", point+"/data/from-sshfs"), "644")
	if want, err := os.ReadFile(big); err != nil || a.ask(t, "/file/data/from-sshfs") != string(want) {
		t.Errorf("the app reads other bytes (%v)", err)
	}
	want(t, a.l.run(t, "find", point, "-type", "f"), point+"/etc/shop-secret/", point+"/data/kept/from-app", point+"/opt/shop/greeting.txt")
	a.l.run(t, "fusermount3", "-u", point)
	ended("fusermount3 -u")
	mount()
	a.l.run(t, "doppel", "leave", "web")
	ended("leave")
	if r := a.l.try(t, "doppel", "sftp", "web"); r.code == 0 || !strings.Contains(r.stderr, `no intercept "web" of yours`) {
		t.Errorf("%v", r)
	}
}

// copies take the place of earlier ones, and of nothing else.
func (a *inPlace) copies(t *testing.T) {
	dir := filepath.Join(a.dir, "copy")
	ingest := func(to string) result {
		return a.l.try(t, "doppel", "ingest", "copied", "-w", "web", "--container=app", "--mount-mode=copy", "--mount", to)
	}
	for range 2 {
		want(t, ingest(dir).String(), "Volume Mount Point: "+dir+" (a copy)")
		if r := a.l.try(t, "sh", "-c", "cat "+dir+"/etc/app/greeting && ls "+dir+"/stale && touch "+dir+"/stale"); r.stdout != "servus" {
			t.Errorf("%v", r)
		}
		a.l.run(t, "touch", dir+"/stale")
		a.l.run(t, "doppel", "leave", "copied")
	}
	want(t, a.l.run(t, "cat", dir+"/etc/app/greeting"), "servus") // it stays
	a.node(t, "echo secret > /var/lib/kept/private && chmod 600 /var/lib/kept/private")
	want(t, ingest(dir).String(), "Volume Mount Point: "+dir+" (a copy; 1 not copied, the first of them /data/kept/private: permission denied)")
	want(t, a.l.run(t, "cat", dir+"/opt/shop/greeting.txt"), "servus") // which comes after it
	a.l.run(t, "doppel", "leave", "copied")
	if r := ingest(a.dir); r.code == 0 || !strings.Contains(r.stderr, a.dir+" is not empty") {
		t.Errorf("a directory of somebody else's: %v", r)
	}
	want(t, a.l.run(t, "doppel", "list", "-i"), "No intercepts")
}

// bad things happen to files and to the laptop: each gives the right error or none, and mount and intercept live on.
// node runs a script on the pod's node.
func (a *inPlace) node(t *testing.T, script string) string {
	t.Helper()
	out, err := a.c.lab("node", "exec", "--", "sh", "-c", script)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(out)
}

func (a *inPlace) bad(t *testing.T) {
	a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--mount=true:rw")
	a.node(t, "echo secret > /var/lib/kept/private && chmod 600 /var/lib/kept/private")
	if r := a.l.try(t, "sh", "-c", "LC_ALL=C cat "+a.point+"/data/kept/private"); r.code == 0 || !strings.Contains(r.stderr, "Permission denied") {
		t.Errorf("a file that the agent may not read: %v", r)
	}

	// A full disk, and a file that vanishes in the pod.
	if r := a.l.try(t, "sh", "-c", "LC_ALL=C dd bs=64k count=64 if=/dev/zero of="+a.point+"/small/f"); r.code == 0 || !strings.Contains(r.stderr, "No space left on device") {
		t.Errorf("4 MiB on a volume of 1: %v", r)
	}
	a.node(t, "echo seen > /var/lib/kept/vanishes")
	if out := a.l.sh(t, "cat "+a.point+"/data/kept/vanishes; exec 3< "+a.point+"/data/kept/vanishes"); out != "seen\n" {
		t.Errorf("%q", out)
	}
	a.node(t, "rm /var/lib/kept/vanishes")
	eventually(t, 5*time.Second, func() error {
		if r := a.l.try(t, "sh", "-c", "LC_ALL=C cat "+a.point+"/data/kept/vanishes"); r.code == 0 || !strings.Contains(r.stderr, "No such file or directory") {
			return fmt.Errorf("a file that is no longer there: %v", r)
		}
		return nil
	})

	// Files are larger than what the agent may have of memory.
	agent := func() corev1.ContainerStatus {
		all := a.pod(t).Status.ContainerStatuses
		return all[slices.IndexFunc(all, func(s corev1.ContainerStatus) bool { return s.Name == "traffic-agent" })]
	}
	before := agent()
	_, id, _ := strings.Cut(before.ContainerID, "://")
	limit := a.node(t, "find /sys/fs/cgroup -path '*"+id+"*/memory.max' -o -path '*"+id+"*/memory.limit_in_bytes'") // of version 2 or 1
	a.node(t, "echo 64M > "+limit)
	a.l.sh(t, "truncate -s 1G "+a.point+"/data/huge && printf end >> "+a.point+"/data/huge && head -c 100M /dev/zero > "+a.point+"/data/zeros")
	if out := a.l.sh(t, "tr -d '\\000' < "+a.point+"/data/huge; tr -d '\\000' < "+a.point+"/data/zeros; stat -c %s "+a.point+"/data/huge "+a.point+"/data/zeros"); out != "end1073741827\n104857600\n" {
		t.Errorf("1 GiB is read as %q", out)
	}
	if after := agent(); after.RestartCount != before.RestartCount || after.ContainerID != before.ContainerID {
		t.Errorf("the agent was %+v and is %+v", before, after)
	}
	a.l.run(t, "rm", a.point+"/data/huge", a.point+"/data/zeros")

	// A thousand requests that nobody here takes.
	codes := a.l.sh(t, "curl -Zs --parallel-max 20 -o /dev/null -w '%{http_code}\\n' -H 'Connection: close' 'http://web."+a.ns+"/environ?[1-1000]' | sort | uniq -c")
	if strings.TrimSpace(codes) != "1000 200" {
		t.Errorf("without a local process: %s", codes)
	}

	// The laptop sleeps, and wakes up.
	a.l.sh(t, "kill -STOP $(pgrep -f '[d]oppel daemon')")
	slept := make(chan result, 1)
	go func() { slept <- a.l.try(t, "sh", "-c", "ls "+a.point+"/etc/app && cat "+a.point+"/etc/app/greeting") }()
	time.Sleep(5 * time.Second)
	a.l.sh(t, "kill -CONT $(pgrep -f '[d]oppel daemon')")
	if r := <-slept; r.code != 0 || !strings.HasSuffix(r.stdout, "servus") {
		t.Errorf("who asked while it slept: %v", r)
	}
	want(t, a.l.run(t, "doppel", "list"), "web   : intercepted")
	a.l.start(t, "env", "WHO=laptop", a.bin, "serve", "127.0.0.1:3000")
	eventually(t, 10*time.Second, func() error {
		if got := a.l.try(t, "curl", "-s", "-m", "5", "http://web."+a.ns+"/environ").stdout; !strings.Contains(got, `"WHO":"laptop"`) {
			return errors.New(got)
		}
		return nil
	})
	a.l.run(t, "doppel", "leave", "web")
}

// secrets are told to the laptop that asked, and to nobody else.
func (a *inPlace) secrets(t *testing.T) {
	a.l.run(t, "doppel", "loglevel", "debug")
	out := a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--env-json", filepath.Join(a.dir, "env.json"))
	token := a.l.run(t, "cat", a.point+"/var/run/secrets/kubernetes.io/serviceaccount/token")
	said := map[string]string{
		"intercept": out, "status": a.l.run(t, "doppel", "status", "-o", "json"), "list": a.l.run(t, "doppel", "list", "-o", "json"),
		"logs of the laptop": a.l.sh(t, "cat ~/.local/state/doppel/*.log; cat ~dev/.local/state/doppel/*.log"),
	}
	for _, path := range []string{"namespaces/" + a.ns + "/intercepts", "sessions"} {
		said[path] = string(ok(a.c.core.Discovery().RESTClient().Get().AbsPath("/apis/doppel.dev/v1alpha1/" + path).DoRaw(t.Context()))(t))
	}
	pods := ok(a.c.core.CoreV1().Pods(a.ns).List(t.Context(), metav1.ListOptions{}))(t)
	said["pods"] = string(ok(json.Marshal(pods))(t))
	events := ok(a.c.core.EventsV1().Events(a.ns).List(t.Context(), metav1.ListOptions{}))(t)
	said["events"] = string(ok(json.Marshal(events))(t))
	logs := func(ns, pod, container string) string {
		return string(ok(a.c.core.CoreV1().Pods(ns).GetLogs(pod, &corev1.PodLogOptions{Container: container}).DoRaw(t.Context()))(t))
	}
	said["log of the agent"] = logs(a.ns, a.pod(t).Name, "traffic-agent")
	for _, p := range ok(a.c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"}))(t).Items {
		said["log of the manager"] += logs(managerNS, p.Name, "traffic-manager")
	}
	for what, text := range said {
		if len(text) == 0 {
			t.Errorf("%s: nothing", what)
		}
		for _, secret := range []string{"open-sesame", "sesame", token[len(token)-40:]} {
			if strings.Contains(text, secret) {
				t.Errorf("%s has a secret:\n%s", what, text)
			}
		}
	}
	a.l.run(t, "doppel", "loglevel", "reset")
	a.l.run(t, "doppel", "leave", "web")
}

// left says what is left of mounts on the laptop.
func (a *inPlace) left(t *testing.T) error {
	t.Helper()
	r := a.l.try(t, "sh", "-c", `grep doppel /proc/mounts; pgrep -a -f '[d]oppel-mount-guard'; ls -d `+a.point)
	if r.stdout != "" {
		return errors.New(r.stdout)
	}
	return nil
}

// ends of all kinds leave nothing behind, with files open or not.
func (a *inPlace) ends(t *testing.T) {
	if err := a.left(t); err != nil {
		t.Error("after leave: ", err)
	}
	intercept := func() {
		t.Helper()
		a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http")
		if a.left(t) == nil {
			t.Fatal("nothing is mounted")
		}
		a.l.start(t, "sh", "-c", "exec 3<"+a.point+"/etc/app/greeting; cd "+a.point+"; exec sleep 300")
	}
	intercept()
	began := time.Now()
	a.l.run(t, "doppel", "leave", "web")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("leave took %s", took)
	}
	if err := a.left(t); err != nil {
		t.Error("after leave with files open: ", err)
	}
	intercept()
	a.l.run(t, "doppel", "quit")
	if err := a.left(t); err != nil {
		t.Error("after quit: ", err)
	}
	a.l.run(t, "doppel", "connect", "-n", a.ns)
	intercept()
	a.l.sh(t, "kill -9 $(pgrep -f '[d]oppel daemon')")
	began = time.Now()
	eventually(t, 5*time.Second, func() error {
		r := a.l.try(t, "sh", "-c", `grep doppel /proc/mounts; pgrep -a -f '[d]oppel-mount-guard'`)
		if r.stdout != "" {
			return errors.New(r.stdout)
		}
		return nil
	})
	t.Logf("after the user daemon was killed, its mount was gone in %s", time.Since(began).Round(10*time.Millisecond))
	a.l.run(t, "doppel", "connect", "-n", a.ns)
	a.l.run(t, "doppel", "intercept", "web", "-p", "3000:http") // on the same directory
	want(t, a.l.run(t, "cat", a.point+"/etc/app/greeting"), "servus")
	a.l.run(t, "doppel", "quit", "-s")
	if err := a.left(t); err != nil {
		t.Error("after all: ", err)
	}
}
