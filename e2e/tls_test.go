package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// selfSigned writes a certificate for names, and returns its files.
func selfSigned(t *testing.T, names ...string) (dir string, data map[string][]byte) {
	t.Helper()
	key := ok(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der := ok(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))(t)
	data = map[string][]byte{
		"tls.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ok(x509.MarshalPKCS8PrivateKey(key))(t)}),
	}
	dir = t.TempDir()
	for file, b := range data {
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, data
}

// TestTLS intercepts requests of an app that speaks TLS, which its clients verify all the while.
func TestTLS(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "tls")
	bin := c.probe(t)
	l := newLaptop(t, "tls")
	l.withManager(t)
	host := "web." + ns + ".svc"
	dir, data := selfSigned(t, host)
	ok(c.core.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "web-tls"}, Type: corev1.SecretTypeTLS, Data: data}, metav1.CreateOptions{}))(t)
	c.workload(t, ns, taken{
		name: "web", kind: "Deployment", run: []string{"tls", "app", ":8443", "/tls"}, ports: []corev1.ContainerPort{{Name: "https", ContainerPort: 8443}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 443, TargetPort: intstr.FromString("https")}}},
		change: func(o any) {
			pod := &o.(*appsv1.Deployment).Spec.Template.Spec
			pod.Volumes = []corev1.Volume{{Name: "tls", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "web-tls"}}}}
			pod.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "tls", MountPath: "/tls"}}
		},
	})
	ip := strings.Split(c.clusterIP(t, ns, "web"), ":")[0]
	ask := func(args ...string) string {
		out, err := c.lab(append([]string{"node", "exec", "--", "curl", "-sS", "-m", "5", "--cacert", filepath.Join(dir, "tls.crt"), "--resolve", host + ":443:" + ip, "https://" + host + "/"}, args...)...)
		if err != nil {
			return fmt.Sprintf("%v %s", err, out)
		}
		return strings.TrimSpace(out)
	}
	is := func(want string, args ...string) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			if got := ask(args...); got != want {
				return fmt.Errorf("%v: %q, want %q", args, got, want)
			}
			return nil
		})
	}
	is("app HTTP/2.0")
	l.run(t, "doppel", "connect", "-n", ns)
	lou := []string{"-H", "X-User: lou"}

	r := l.try(t, "doppel", "intercept", "web", "-p", "3000", "--http-match=x-user=lou")
	if r.code == 0 || !strings.Contains(r.stderr, "doppel.dev/tls: 8443=SECRET") || !strings.Contains(r.stderr, "take the port whole") {
		t.Errorf("without the annotation: %v", r)
	}
	patch := `{"spec":{"template":{"metadata":{"annotations":{"doppel.dev/tls":"8443=web-tls"}}}}}`
	ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}))(t)
	c.available(t, ns, "web")

	l.start(t, bin, "web", "laptop", "127.0.0.1:3000", "127.0.0.1:3001")
	want(t, l.run(t, "doppel", "intercept", "web", "-p", "3000", "--http-match=x-user=lou"), "State          : ACTIVE")
	for _, v := range []string{"--http1.1", "--http2"} {
		eventually(t, 10*time.Second, func() error {
			if got := ask(append(lou, v, "-i")...); !strings.Contains(got, "laptop") {
				return fmt.Errorf("%s: %q", v, got)
			}
			return nil
		})
	}
	is("app HTTP/2.0")
	is("app HTTP/1.1", "--http1.1")
	l.run(t, "doppel", "leave", "web")
	is("app HTTP/2.0", lou...)

	localDir, _ := selfSigned(t, "localhost")
	l.start(t, bin, "tls", "local", "127.0.0.1:3443", localDir)
	want(t, l.run(t, "doppel", "intercept", "web", "-p", "3443", "--http-match=x-user=lou", "--local-tls"), "State          : ACTIVE")
	is("local HTTP/2.0", lou...)
	is("local HTTP/1.1", append(lou, "--http1.1")...)
	is("app HTTP/2.0")
}
