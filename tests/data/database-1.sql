BEGIN TRANSACTION;
CREATE TABLE autoflash_schema (
	version INTEGER NOT NULL,
	autoflash VARCHAR(64) NOT NULL,
	migrated VARCHAR(32) NOT NULL,
	PRIMARY KEY (version)
);
INSERT INTO "autoflash_schema" VALUES(1,'0.1.0','2026-11-21T10:03:31+00:00');
CREATE TABLE best (
	problem VARCHAR(255) NOT NULL,
	op VARCHAR(32) NOT NULL,
	dtype VARCHAR(32) NOT NULL,
	batch BIGINT NOT NULL,
	seqlen_q BIGINT NOT NULL,
	seqlen_k BIGINT NOT NULL,
	num_heads BIGINT NOT NULL,
	num_kv_heads BIGINT NOT NULL,
	head_dim BIGINT NOT NULL,
	head_dim_v BIGINT NOT NULL,
	causal BOOLEAN NOT NULL,
	aligned BOOLEAN NOT NULL,
	device_key VARCHAR(255) NOT NULL,
	arch VARCHAR(32) NOT NULL,
	template VARCHAR(255) NOT NULL,
	template_digest VARCHAR(64) NOT NULL,
	config TEXT NOT NULL,
	outcome VARCHAR(32) NOT NULL,
	policy VARCHAR(255) NOT NULL,
	latency_us DOUBLE,
	created VARCHAR(32) NOT NULL,
	record TEXT NOT NULL,
	pack VARCHAR(255),
	PRIMARY KEY (problem, device_key),
	FOREIGN KEY(device_key) REFERENCES device ("key"),
	FOREIGN KEY(pack) REFERENCES pack (name)
);
INSERT INTO "best" VALUES('b16s1024h32/32d64f-float16','fwd','float16',16,1024,1024,32,32,64,64,0,1,'nvidia-h100-80gb-hbm3:sm90:132','sm90','triton/fwd','d1','triton/fwd{"block_m":128,"block_n":64}','ok','cuda-events-cold',40.0,'2026-11-21T10:00:00+00:00','{"config":{"template":"triton/fwd","values":{"block_m":128,"block_n":64}},"created":"2026-11-21T10:00:00+00:00","default_us":null,"device":{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048},"environment":{"driver":"580.1","torch":"2.13.0"},"error_ratio":null,"measurement":{"count":50,"latency_us":40.0,"p20_us":39.0,"p80_us":41.0},"outcome":"ok","policy":"cuda-events-cold","predicted_us":null,"problem":{"aligned":true,"batch":16,"causal":false,"dtype":"float16","head_dim":64,"head_dim_v":64,"num_heads":32,"num_kv_heads":32,"op":"fwd","seqlen_k":1024,"seqlen_q":1024},"reason":"","resources":{"registers":168,"spill_bytes":0},"source_digest":"","template_digest":"d1","torch_provider":null,"torch_us":null}','nvidia-h200.jsonl');
INSERT INTO "best" VALUES('b4s4096h32/8d128c-bfloat16','fwd','bfloat16',4,4096,4096,32,8,128,128,1,1,'nvidia-h100-80gb-hbm3:sm90:132','sm90','triton/fwd','d1','triton/fwd{"block_m":128,"block_n":64}','ok','cuda-events-cold',100.0,'2026-11-21T10:00:00+00:00','{"config":{"template":"triton/fwd","values":{"block_m":128,"block_n":64}},"created":"2026-11-21T10:00:00+00:00","default_us":null,"device":{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048},"environment":{"driver":"580.1","torch":"2.13.0"},"error_ratio":null,"measurement":{"count":50,"latency_us":100.0,"p20_us":99.0,"p80_us":101.0},"outcome":"ok","policy":"cuda-events-cold","predicted_us":null,"problem":{"aligned":true,"batch":4,"causal":true,"dtype":"bfloat16","head_dim":128,"head_dim_v":128,"num_heads":32,"num_kv_heads":8,"op":"fwd","seqlen_k":4096,"seqlen_q":4096},"reason":"","resources":{"registers":168,"spill_bytes":0},"source_digest":"","template_digest":"d1","torch_provider":null,"torch_us":null}',NULL);
CREATE TABLE device (
	"key" VARCHAR(255) NOT NULL,
	name VARCHAR(255) NOT NULL,
	arch VARCHAR(32) NOT NULL,
	num_sms INTEGER NOT NULL,
	facts TEXT NOT NULL,
	PRIMARY KEY ("key")
);
INSERT INTO "device" VALUES('nvidia-h100-80gb-hbm3:sm90:132','NVIDIA H100 80GB HBM3','sm90',132,'{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048}');
CREATE TABLE environment (
	digest VARCHAR(64) NOT NULL,
	facts TEXT NOT NULL,
	PRIMARY KEY (digest)
);
INSERT INTO "environment" VALUES('851b8dbc83237080a80818d773346b6db2902e26e79f082f70215e36b7fce0e7','{"torch":"2.13.0"}');
INSERT INTO "environment" VALUES('619dc7f635bfb2c8c8ddf16202549f826b4e025d959c42ce31dbe9c39bcad9ff','{"driver":"580.1","torch":"2.13.0"}');
CREATE TABLE pack (
	name VARCHAR(255) NOT NULL,
	digest VARCHAR(64) NOT NULL,
	loaded VARCHAR(32) NOT NULL,
	PRIMARY KEY (name)
);
INSERT INTO "pack" VALUES('nvidia-h200.jsonl','aef1621ed061cec08a877c25772faaec17d342c30c92d8c2b2c41a59df5906d4','2026-11-21T10:03:31+00:00');
CREATE TABLE run (
	id INTEGER NOT NULL,
	uid VARCHAR(32) NOT NULL,
	command TEXT NOT NULL,
	device_key VARCHAR(255) NOT NULL,
	environment VARCHAR(64) NOT NULL,
	seed BIGINT NOT NULL,
	budget TEXT NOT NULL,
	status VARCHAR(32) NOT NULL,
	started VARCHAR(32) NOT NULL,
	ended VARCHAR(32),
	PRIMARY KEY (id),
	UNIQUE (uid),
	FOREIGN KEY(device_key) REFERENCES device ("key"),
	FOREIGN KEY(environment) REFERENCES environment (digest)
);
INSERT INTO "run" VALUES(1,'f3b9b56afca84abc99a5e450e92dc557','autoflash tune --head-dim 128','nvidia-h100-80gb-hbm3:sm90:132','851b8dbc83237080a80818d773346b6db2902e26e79f082f70215e36b7fce0e7',7,'{"trials":3}','done','2026-11-21T10:03:31+00:00','2026-11-21T10:03:31+00:00');
CREATE TABLE trial (
	id INTEGER NOT NULL,
	digest VARCHAR(64) NOT NULL,
	run INTEGER,
	problem VARCHAR(255) NOT NULL,
	op VARCHAR(32) NOT NULL,
	dtype VARCHAR(32) NOT NULL,
	batch BIGINT NOT NULL,
	seqlen_q BIGINT NOT NULL,
	seqlen_k BIGINT NOT NULL,
	num_heads BIGINT NOT NULL,
	num_kv_heads BIGINT NOT NULL,
	head_dim BIGINT NOT NULL,
	head_dim_v BIGINT NOT NULL,
	causal BOOLEAN NOT NULL,
	aligned BOOLEAN NOT NULL,
	device_key VARCHAR(255) NOT NULL,
	arch VARCHAR(32) NOT NULL,
	template VARCHAR(255) NOT NULL,
	template_digest VARCHAR(64) NOT NULL,
	config TEXT NOT NULL,
	outcome VARCHAR(32) NOT NULL,
	policy VARCHAR(255) NOT NULL,
	latency_us DOUBLE,
	created VARCHAR(32) NOT NULL,
	record TEXT NOT NULL,
	source_digest VARCHAR(64) NOT NULL,
	environment VARCHAR(64) NOT NULL,
	PRIMARY KEY (id),
	UNIQUE (digest),
	FOREIGN KEY(run) REFERENCES run (id),
	FOREIGN KEY(device_key) REFERENCES device ("key"),
	FOREIGN KEY(environment) REFERENCES environment (digest)
);
INSERT INTO "trial" VALUES(1,'a0f35afba62b0bb1c4b573f5b8d84b374604f96ea7331cbacd1fc42a7955022e',1,'b4s4096h32/8d128c-bfloat16','fwd','bfloat16',4,4096,4096,32,8,128,128,1,1,'nvidia-h100-80gb-hbm3:sm90:132','sm90','triton/fwd','d1','triton/fwd{"block_m":128,"block_n":64}','ok','cuda-events-cold',100.0,'2026-11-21T10:00:00+00:00','{"config":{"template":"triton/fwd","values":{"block_m":128,"block_n":64}},"created":"2026-11-21T10:00:00+00:00","default_us":null,"device":{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048},"environment":{"driver":"580.1","torch":"2.13.0"},"error_ratio":null,"measurement":{"count":50,"latency_us":100.0,"p20_us":99.0,"p80_us":101.0},"outcome":"ok","policy":"cuda-events-cold","predicted_us":null,"problem":{"aligned":true,"batch":4,"causal":true,"dtype":"bfloat16","head_dim":128,"head_dim_v":128,"num_heads":32,"num_kv_heads":8,"op":"fwd","seqlen_k":4096,"seqlen_q":4096},"reason":"","resources":{"registers":168,"spill_bytes":0},"source_digest":"","template_digest":"d1","torch_provider":null,"torch_us":null}','','619dc7f635bfb2c8c8ddf16202549f826b4e025d959c42ce31dbe9c39bcad9ff');
INSERT INTO "trial" VALUES(2,'52ea597e199551185d75b25c5470afe56d1c3943a94fed4c654769956bc385aa',1,'b4s4096h32/8d128c-bfloat16','fwd','bfloat16',4,4096,4096,32,8,128,128,1,1,'nvidia-h100-80gb-hbm3:sm90:132','sm90','triton/fwd','d1','triton/fwd{"block_m":128,"block_n":64}','crash','cuda-events-cold',NULL,'2026-11-21T10:00:00+00:00','{"config":{"template":"triton/fwd","values":{"block_m":128,"block_n":64}},"created":"2026-11-21T10:00:00+00:00","default_us":null,"device":{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048},"environment":{"driver":"580.1","torch":"2.13.0"},"error_ratio":null,"measurement":null,"outcome":"crash","policy":"cuda-events-cold","predicted_us":null,"problem":{"aligned":true,"batch":4,"causal":true,"dtype":"bfloat16","head_dim":128,"head_dim_v":128,"num_heads":32,"num_kv_heads":8,"op":"fwd","seqlen_k":4096,"seqlen_q":4096},"reason":"größer als \"erlaubt\"","resources":{"registers":168,"spill_bytes":0},"source_digest":"","template_digest":"d1","torch_provider":null,"torch_us":null}','','619dc7f635bfb2c8c8ddf16202549f826b4e025d959c42ce31dbe9c39bcad9ff');
INSERT INTO "trial" VALUES(3,'73752a3e96a9544c0536e98d7f4df6c8242dc7f3dec288c778690947d5f33207',NULL,'b1s1x777h8/2d96x64c-float32-unaligned','fwd','float32',1,1,777,8,2,96,64,1,0,'nvidia-h100-80gb-hbm3:sm90:132','sm90','triton/fwd','d1','triton/fwd{"block_m":128,"block_n":64}','predicted','cuda-events-cold',12.5,'2026-11-21T10:00:00+00:00','{"config":{"template":"triton/fwd","values":{"block_m":128,"block_n":64}},"created":"2026-11-21T10:00:00+00:00","default_us":null,"device":{"arch":"sm90","clock_ghz":1.83,"isa":[],"l2_bytes":52428800,"memory_gbps":3350,"name":"NVIDIA H100 80GB HBM3","num_sms":132,"registers_per_sm":65536,"smem_bytes_per_block":232448,"smem_bytes_per_sm":233472,"tflops_16bit":989,"tflops_fp32":66.9,"threads_per_sm":2048},"environment":{"driver":"580.1","torch":"2.13.0"},"error_ratio":null,"measurement":null,"outcome":"predicted","policy":"cuda-events-cold","predicted_us":12.5,"problem":{"aligned":false,"batch":1,"causal":true,"dtype":"float32","head_dim":96,"head_dim_v":64,"num_heads":8,"num_kv_heads":2,"op":"fwd","seqlen_k":777,"seqlen_q":1},"reason":"","resources":{"registers":168,"spill_bytes":0},"source_digest":"","template_digest":"d1","torch_provider":null,"torch_us":null}','','619dc7f635bfb2c8c8ddf16202549f826b4e025d959c42ce31dbe9c39bcad9ff');
CREATE INDEX trial_problem ON trial (problem, device_key);
CREATE INDEX trial_template ON trial (template, template_digest);
CREATE INDEX best_arch ON best (arch);
COMMIT;
