package manager

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"maps"
	"strconv"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// objectName is the fixed name of the manager's Deployment, Service, Secret and ConfigMap.
const objectName = "traffic-manager"

// Keys of the Secret and the ConfigMap.
const (
	secretIdentity  = "identity.pem"
	configKey       = "key"        // the fingerprint laptops pin
	configVersion   = "version"    // the manager's version
	configProtocol  = "protocol"   // the tunnel protocol it speaks
	configReach     = "reach"      // "all" where it does not check what sessions get to, "namespaces" where all get to all of these
	configWebhook   = "webhook"    // "none" where it has none
	configInject    = "injection"  // InjectEnabledOnly where only annotated workloads get agents
	configListed    = "namespaces" // those that it is for; none: the whole cluster
	configPod       = "pod"        // where ports are forwarded to
	configDirect    = "direct"     // where laptops reach it without the API server, comma-separated; missing: nowhere
	webhookPrefix   = "doppel-agent-injector-"
	injectorService = "agent-injector"
)

// ensureIdentity loads the manager's key from its Secret, or makes one on the first start. The chart creates it empty, so that helm uninstall takes it
// along. All replicas share the key: whoever writes the Secret first wins.
func ensureIdentity(ctx context.Context, kc client.Client, cfg Config) (*tunnel.Identity, error) {
	key := client.ObjectKey{Namespace: cfg.Namespace, Name: objectName}
	id, err := loadIdentity(ctx, kc, key)
	if apierrors.IsConflict(err) { // another replica wrote it between our read and our write
		id, err = loadIdentity(ctx, kc, key)
	}
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", key, err)
	}
	return id, nil
}

func loadIdentity(ctx context.Context, kc client.Client, key client.ObjectKey) (*tunnel.Identity, error) {
	var sec corev1.Secret
	if err := kc.Get(ctx, key, &sec); err != nil {
		return nil, err
	}
	if b := sec.Data[secretIdentity]; len(b) > 0 {
		return tunnel.ParseIdentity(b)
	}
	id, err := tunnel.NewIdentity(
		injectorService+"."+key.Namespace+".svc", objectName+"."+key.Namespace+".svc", objectName+"."+key.Namespace+".svc.cluster.local")
	if err != nil {
		return nil, err
	}
	pem, err := id.MarshalPEM()
	if err != nil {
		return nil, err
	}
	sec.Data = map[string][]byte{secretIdentity: pem}
	return id, kc.Update(ctx, &sec) // refused if somebody else wrote since (resourceVersion)
}

// publish writes into the ConfigMap, which the chart creates empty, too, what laptops need to know of the manager that leads.
func publish(ctx context.Context, live client.Reader, kc client.Client, fingerprint string, cfg Config) error {
	var c corev1.ConfigMap
	if err := live.Get(ctx, client.ObjectKey{Namespace: cfg.Namespace, Name: objectName}, &c); err != nil {
		return err
	}
	want := map[string]string{configKey: fingerprint, configVersion: buildinfo.Version, configProtocol: strconv.Itoa(wire.Version), configPod: cfg.PodName}
	switch {
	case !cfg.CheckReach:
		want[configReach] = "all"
	case cfg.NoPolicy:
		want[configReach] = "namespaces"
	}
	if cfg.NoWebhook {
		want[configWebhook] = "none"
	}
	if cfg.Injection == InjectEnabledOnly {
		want[configInject] = InjectEnabledOnly
	}
	if cfg.Namespaces != "" {
		want[configListed] = cfg.Namespaces
	}
	if d := c.Data[configDirect]; d != "" && cfg.DirectAddr != "" { // publishDirect's
		want[configDirect] = d
	}
	if maps.Equal(c.Data, want) {
		return nil
	}
	c.Data = want
	return kc.Update(ctx, &c)
}

// publishCABundle writes our certificate into the webhook's configuration and repairs it when a helm upgrade or someone else takes it out.
func (m *Manager) publishCABundle(ctx context.Context) error {
	if m.cfg.NoWebhook {
		return nil
	}
	for {
		wait := 10 * time.Second
		if err := m.ensureCABundle(ctx); err != nil {
			m.cfg.Log.Warn("webhook configuration not updated, nothing will be injected", "err", err)
			wait = time.Second // it may come after us
		} else {
			m.presence.webhookReady()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (m *Manager) ensureCABundle(ctx context.Context) error {
	var wh admissionv1.MutatingWebhookConfiguration
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Name: webhookPrefix + m.cfg.Namespace}, &wh); err != nil {
		return err
	}
	bundle := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.identity.TLSCertificate().Certificate[0]})
	changed := false
	for i := range wh.Webhooks {
		if !bytes.Equal(wh.Webhooks[i].ClientConfig.CABundle, bundle) {
			wh.Webhooks[i].ClientConfig.CABundle, changed = bundle, true
		}
	}
	if !changed {
		return nil
	}
	return m.ctrl.GetClient().Update(ctx, &wh)
}
